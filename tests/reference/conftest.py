"""The PyTorch CLIPs as fixtures. Install them with the extra `peers` (Python 3.11)."""

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["*"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The libraries warn of their own age."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.filterwarnings("ignore"))


@pytest.fixture(scope="session")
def openai_clip():
    """`clip` of openai-clip 1.0.1."""
    from tests.reference.parity import import_openai_clip

    return import_openai_clip()


@pytest.fixture(scope="session")
def open_clip():
    import open_clip

    return open_clip
