"""The notebooks run from top to bottom and are the same in both of their files.

`tests/reference/test_notebook.py` runs `convert`, which needs PyTorch.
"""

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


@pytest.mark.parametrize(
    ("name", "drawn"), [("quickstart", 4), ("zero_shot", 5), ("convert", 2), ("scaling", 4)]
)
def test_both_files_say_the_same_and_outputs_are_saved(name: str, drawn: int):
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    text = jupytext.read(NOTEBOOKS / f"{name}.py")
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in text.cells
    ]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == drawn
    assert not [output for output in outputs if output.output_type == "error"]
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 500_000


def test_quickstart_trains_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # It trains under the root that it finds above its folder: here one without earlier runs.
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setenv("CLIP_JAX_NOTEBOOK_STEPS", str(STEPS))
    printed, drawn = execute_notebook("quickstart", tmp_path, monkeypatch)
    assert len(drawn) == 4
    assert "80 numbers to train on; 20 never shown" in printed
    workdir = tmp_path / "runs" / f"quickstart-{STEPS}"
    result = json.loads((workdir / "result.json").read_text())
    assert result["step"] == STEPS
    assert f"unseen numbers  top-1 {result['zero_shot/unseen/top1']:.1%}" in printed
    assert "own caption nearest: " in printed
    assert "scribbled twelve" in printed


def test_zero_shot_takes_any_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = dataclasses.replace(TINY.text, vocab_size=4_096, context_length=32)
    write_tiny_model(tmp_path / "model", config=dataclasses.replace(TINY, text=text))
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # its pictures go to runs/ beside it
    monkeypatch.setenv("CLIP_JAX_NOTEBOOK_MODEL", str(tmp_path / "model"))
    printed, drawn = execute_notebook("zero_shot", tmp_path, monkeypatch)
    assert len(drawn) == 5
    assert "ViTConfig, 16 pixels, 16 dimensions" in printed
    assert "own description nearest: " in printed
    shares = dict(re.findall(r"^(\w+ +\d+) of each +([\d.]+)%$", printed, re.M))
    assert shares.keys() == {f"{x:8} {n:2}" for x in ("features", "pixels") for n in (1, 4, 16)}
    assert float(shares["pixels   16"]) == pytest.approx(72.4, abs=1)  # of any model


def test_scaling_recovers_the_published_fits(monkeypatch: pytest.MonkeyPatch):
    printed, drawn = execute_notebook("scaling", NOTEBOOKS, monkeypatch)
    assert "ImageNet                              LAION  -0.1114   5.858" in printed
    assert "OpenAI  -0.2378   211.7" in printed
    assert "ViT-bigG-14@68B: 81.9%" in printed
    assert "not determined by these runs" in printed
    assert "held out: 9 runs predicted from the 27 others" in printed  # of the digits' ladder
    assert len(drawn) == 4
