"""The notebooks run from top to bottom and are the same in both of their files."""

import dataclasses
import json
import re
from pathlib import Path

import jupytext
import nbformat
import pytest

from tests.conftest import ROOT, TINY, execute_notebook, write_tiny_model

NOTEBOOKS = ROOT / "notebooks"
STEPS = 16

# Libraries of the kernel's own, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


DRAWN = {"quickstart": 4, "zero_shot": 5, "convert": 2, "scaling": 4}


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a notebook, which must draw as many pictures as are saved in it; what it printed."""
    printed, drawn = execute_notebook(name, folder, monkeypatch)
    assert len(drawn) == DRAWN[name]
    return printed


@pytest.mark.parametrize("name", DRAWN)
def test_both_files_say_the_same_and_outputs_are_saved(name: str):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    text = jupytext.read(NOTEBOOKS / f"{name}.py")
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in text.cells
    ]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == DRAWN[name]
    assert not [output for output in outputs if output.output_type == "error"]
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 500_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root that a notebook finds above its folder, under which it trains: without runs yet."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def test_quickstart_trains_and_draws(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIP_JAX_NOTEBOOK_STEPS", str(STEPS))
    printed = execute("quickstart", root, monkeypatch)
    assert "80 numbers to train on; 20 never shown" in printed
    result = json.loads((root / f"runs/quickstart-{STEPS}/result.json").read_text())
    assert result["step"] == STEPS
    assert f"unseen numbers  top-1 {result['zero_shot/unseen/top1']:.1%}" in printed
    assert "own caption nearest: " in printed
    assert "scribbled twelve" in printed


def test_zero_shot_takes_any_model(root: Path, monkeypatch: pytest.MonkeyPatch):
    text = dataclasses.replace(TINY.text, vocab_size=4_096, context_length=32)
    write_tiny_model(root / "model", config=dataclasses.replace(TINY, text=text))
    monkeypatch.setenv("CLIP_JAX_NOTEBOOK_MODEL", str(root / "model"))
    printed = execute("zero_shot", root, monkeypatch)
    assert "ViTConfig, 16 pixels, 16 dimensions" in printed
    assert "own description nearest: " in printed
    shares = dict(re.findall(r"^(\w+ +\d+) of each +([\d.]+)%$", printed, re.M))
    assert shares.keys() == {f"{x:8} {n:2}" for x in ("features", "pixels") for n in (1, 4, 16)}
    assert float(shares["pixels   16"]) == pytest.approx(72.4, abs=1)  # of any model


def test_scaling_recovers_the_published_fits(monkeypatch: pytest.MonkeyPatch):
    printed = execute("scaling", NOTEBOOKS, monkeypatch)
    assert "ImageNet                              LAION  -0.1114   5.858" in printed
    assert "OpenAI  -0.2378   211.7" in printed
    assert "ViT-bigG-14@68B: 81.9%" in printed
    assert "not determined by these runs" in printed
    assert "held out: 9 runs predicted from the 27 others" in printed  # of the digits' ladder


def test_convert_gives_pytorchs_numbers(root: Path, monkeypatch: pytest.MonkeyPatch):
    """And shows by how much other inputs move them."""
    monkeypatch.setenv("CLIP_JAX_NOTEBOOK_STEPS", "8")
    printed = execute("convert", root, monkeypatch)
    for what in ("relative difference:", "of a probability:", "moved by a pixel"):
        assert float(re.search(rf"{what} (\S+)", printed)[1]) <= 1e-5
    assert float(re.search(r"mean difference (\S+)", printed)[1]) > 0.01
    same, arrays = re.search(r"(\d+) of (\d+) arrays are the same bits", printed).groups()
    assert int(same) == int(arrays) > 20
    verdicts = re.findall(r"^'.*' +(same|\d+ tokens here, \d+ there)$", printed, re.M)
    assert [verdict == "same" for verdict in verdicts] == [True, False, False, True]
