"""`clip-jax demo` as a person meets it: a process, and its page in a headless Chromium."""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import expect

from clip_jax.cli.commands import main
from clip_jax.inference.embed import read_manifest
from clip_jax.inference.loading import load
from clip_jax.inference.predict import PredictConfig, predict
from clip_jax.inference.search import Embeddings
from tests.conftest import ROOT, TINY, write_tiny_model

COLORS = ("red", "lime", "blue", "yellow", "black", "white")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, six pictures and their embeddings."""
    path = tmp_path_factory.mktemp("demo")
    text = dataclasses.replace(TINY.text, context_length=32)
    write_tiny_model(path / "model", config=dataclasses.replace(TINY, text=text))
    (path / "photos").mkdir()
    for color in COLORS:
        Image.new("RGB", (60, 40), color).save(path / "photos" / f"{color}.png")
    (path / "broken.png").write_bytes(b"not an image")
    assert main(["embed", *(str(path / name) for name in ("model", "photos", "embeddings"))]) == 0
    return path


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The web demo, started as the documentation says, until the tests are over."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    page = (ROOT / "docs/how-to/command-line.md").read_text()
    (shown,) = re.findall(r"^clip-jax (demo \S+ --embeddings) ", page, re.M)
    command = shown.replace("runs/class_folders", str(folder / "model")).split()
    command = ["-m", "clip_jax", *command, str(folder / "embeddings"), "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-u", *command],
        env=ENVIRONMENT | {"GRADIO_TEMP_DIR": str(folder / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"http://127.0.0.1:{port}"
    assert process.stdout
    with process:
        assert any(url in (last := line) for line in process.stdout), last
        yield url
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130)


@pytest.fixture
def page(address: str, browser: Any) -> Iterator[Any]:
    """A page that may talk to this machine alone, and fails the test if it asks for more."""
    outside = []
    page = browser.new_page(viewport={"width": 1100, "height": 800})
    page.set_default_timeout(60_000)
    page.on("request", lambda request: outside.append(request.url))
    page.goto(address)
    yield page
    assert [url for url in outside if not re.match(rf"{address}|data:|blob:", url)] == []


def test_an_image_and_labels_become_bars_and_what_is_missing_is_named(folder, page):
    labels = page.get_by_label("Labels, one per line")
    button = page.get_by_role("button", name="Label", exact=True)
    upload = page.locator("input[type=file]").first
    bars = page.get_by_test_id("label-output-value")

    def shows_error(text: str) -> None:
        button.click()
        expect(page.get_by_test_id("toast-body").filter(has_text=text)).to_be_in_viewport()

    labels.fill("cat")
    shows_error("Drop an image first.")
    upload.set_input_files(folder / "photos/red.png")
    labels.fill(" \n")
    shows_error("give at least one label")
    labels.fill("a cat\n\n  seven \nred")
    button.click()
    expect(bars).not_to_be_empty()
    given = {"images": (folder / "photos/red.png",), "labels": ("a cat", "seven", "red")}
    expected = predict(PredictConfig(model=folder / "model", **given))[0]["labels"]
    assert bars.inner_text().strip() == expected[0]["label"]
    shown = page.locator("[data-testid$='-confidence-set'], .confidence-set")
    assert shown.count() == 3
    for row, best in zip(shown.all(), expected, strict=True):
        assert best["label"] in row.inner_text()
        assert f"{best['probability']:.0%}" in row.inner_text()
    page.reload()
    upload.set_input_files(folder / "broken.png")
    labels.fill("cat")
    shows_error("not an image")


def test_a_text_becomes_the_closest_images(folder, page):
    page.get_by_role("tab", name="Search").click()
    page.get_by_label("What to look for").fill("a red bicycle")
    page.get_by_label("What to look for").press("Enter")
    captions = page.locator(".caption-label")
    expect(captions).to_have_count(len(COLORS))
    model = load(folder / "model")
    text = np.asarray(model.encode_text(model.tokenize(["a red bicycle"])))[0]
    manifest = read_manifest(folder / "embeddings")
    embeddings = Embeddings(folder / "embeddings", manifest, model.config.embed_dim)
    ranked = zip(*embeddings.exact(text / np.linalg.norm(text), 12), strict=True)
    expected = [f"{similarity:.3f} {embeddings.row(int(row))[1]}" for row, similarity in ranked]
    assert [" ".join(text.split()) for text in captions.all_inner_texts()] == expected
    for image in page.locator(".thumbnail-item img").all():
        assert image.evaluate("image => image.complete && image.naturalWidth") == 60


def test_it_is_served_to_this_machine_alone_and_a_port_in_use_is_one_message(folder, address):
    port = address.rpartition(":")[2]
    # Another of this machine's addresses: 0.0.0.0 would answer for it.
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(port)), timeout=2)
    done = subprocess.run(
        [sys.executable, "-m", "clip_jax", "demo", str(folder / "model"), "--port", port],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"cannot serve at 127.0.0.1:{port}" in done.stderr
    assert "Traceback" not in done.stderr
