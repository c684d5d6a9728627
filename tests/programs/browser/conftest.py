"""A headless Chromium. Playwright and Gradio come with the extra `browser`."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome"))), None)
# The browser itself asks for nothing outside either.
FLAGS = "--no-sandbox --disable-gpu --disable-quic --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync --no-first-run"

expect.set_options(timeout=60_000)  # a busy machine compiles for as long before it answers


@pytest.fixture
def browser() -> Iterator[Any]:
    """A Chromium of its own for a test."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()
