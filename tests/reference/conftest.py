"""The PyTorch CLIPs as fixtures. Install them with the extra `peers` (Python 3.11)."""

import importlib.util
import warnings

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def openai_clip():
    """`clip` of openai-clip 1.0.1."""
    from tests.reference.parity import import_openai_clip

    return import_openai_clip()


@pytest.fixture(scope="session")
def open_clip():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
    return open_clip
