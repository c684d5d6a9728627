"""The PyTorch CLIPs as fixtures. Install them with the extra `peers` (Python 3.11)."""

import importlib.util
import sys
import types
import warnings

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*"]


@pytest.fixture(scope="session")
def openai_clip():
    """`clip` of openai-clip 1.0.1, which imports `pkg_resources`, gone from new setuptools."""
    import packaging.version

    if importlib.util.find_spec("pkg_resources") is None:
        stub = types.ModuleType("pkg_resources")
        stub.packaging = packaging
        sys.modules.setdefault("pkg_resources", stub)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import clip
    return clip


@pytest.fixture(scope="session")
def open_clip():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import open_clip
    return open_clip
