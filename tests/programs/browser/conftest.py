"""Pages in a headless Chromium. Install what it takes with the extra `browser`."""

import importlib.util
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
# The browser itself asks for nothing outside either.
FLAGS = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --no-first-run"

needed = {"test_demo.py": ("gradio", "playwright"), "test_report.py": ("playwright",)}
collect_ignore = [
    file
    for file, names in needed.items()
    if any(importlib.util.find_spec(name) is None for name in names)
]


@pytest.fixture
def browser() -> Iterator[Any]:
    """A Chromium of its own for a test."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()
