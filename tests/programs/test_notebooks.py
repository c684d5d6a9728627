"""The notebooks run from top to bottom and are the same in both of their files."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest

import clip_jax
from tests.conftest import ROOT, TINY, execute_notebook, made_once, write_tiny_model

NOTEBOOKS = ROOT / "notebooks"
STEPS = 16

# Libraries of the kernel's own, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


DRAWN = {"quickstart": 4, "zero_shot": 6, "convert": 2, "scaling": 4, "free_tpu": 1}


def execute(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a notebook, which must draw as many pictures as are saved in it; what it printed."""
    monkeypatch.setenv("CLIP_JAX_NOTEBOOK_STEPS", str(STEPS))
    printed, drawn = execute_notebook(name, folder, monkeypatch)
    assert len(drawn) == DRAWN[name]
    return printed


@pytest.fixture
def quickstart(tmp_path_factory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the quickstart has run, once for all tests, with what it printed."""

    def run(folder: Path) -> None:
        (folder / "printed.txt").write_text(execute("quickstart", folder, monkeypatch))

    return made_once(tmp_path_factory, "quickstart", run)


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
    printed = "".join(output.get("text", "") for output in outputs)
    assert not re.search(r"/(work|tmp|root|usr)/|site-packages", printed)  # of a machine
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < 500_000


def test_outside_of_a_clone_the_scaling_notebook_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not in a clone of the repository"):
        exec(first_cell("scaling"), {})


def first_cell(name: str) -> str:
    cells = jupytext.read(NOTEBOOKS / f"{name}.py").cells
    first = next(cell.source for cell in cells if cell.cell_type == "code")
    return first.replace("%matplotlib inline", "")


def test_zero_shot_takes_the_run_of_a_short_quickstart(tmp_path, monkeypatch):
    class Trained(Exception):
        pass

    def train_model(config: clip_jax.Config, workdir: Path, **changes: Any) -> None:
        raise Trained(workdir, changes["steps"])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(clip_jax, "train_model", train_model)
    monkeypatch.setenv("CLIP_JAX_NOTEBOOK_STEPS", "100")
    with pytest.raises(Trained) as trained:
        exec(first_cell("zero_shot"), {})
    assert trained.value.args == (Path("runs/digits-100"), 100)


def test_quickstart_trains_and_draws(quickstart: Path):
    printed = (quickstart / "printed.txt").read_text()
    assert "80 numbers in the training set; 20 unseen numbers: [14, " in printed
    result = json.loads((quickstart / f"runs/digits-{STEPS}/result.json").read_text())
    assert result["step"] == STEPS
    assert f"unseen numbers  top-1 {result['zero_shot/unseen/top1']:.1%}" in printed
    assert re.search(r"images closest to their own caption: \d+ of 10$", printed, re.M)
    labels = re.findall(r"^image of 72: (scribbled .*?) +(\d+)%$", printed, re.M)
    assert len(labels) == 4
    assert 98 <= sum(int(share) for _, share in labels) <= 102  # rounded


def test_zero_shot_takes_any_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    text = dataclasses.replace(TINY.text, vocab_size=4_096, context_length=32)
    write_tiny_model(tmp_path / "model", config=dataclasses.replace(TINY, text=text))
    monkeypatch.setenv("CLIP_JAX_NOTEBOOK_MODEL", str(tmp_path / "model"))
    printed = execute("zero_shot", tmp_path, monkeypatch)
    assert "ViTConfig, 16 pixels, 16 dimensions" in printed
    assert re.search(r"one prompt [\d.]+% on average, ensemble [\d.]+%", printed)
    assert re.search(r"photographs closest to their own description: \d of 8$", printed, re.M)
    shares = dict(re.findall(r"^(\w+ +\d+) per class +([\d.]+)%$", printed, re.M))
    assert shares.keys() == {f"{x:8} {n:2}" for x in ("features", "pixels") for n in (1, 4, 16)}
    assert float(shares["pixels   16"]) == pytest.approx(72.4, abs=1)  # of any model


def test_scaling_recovers_the_published_fits(monkeypatch: pytest.MonkeyPatch):
    printed = execute("scaling", NOTEBOOKS, monkeypatch)
    fits = dict(re.findall(r"^(\w+ .*?)  +(-[-\d. ]+)$", printed, re.M))
    assert fits["ImageNet top-1"].split() == ["-0.1114", "5.858", "-0.1638", "23.18"]
    assert fits["ImageNet robustness top-1"].split() == ["-0.1255", "11.61", "-0.2378", "211.7"]
    assert "ViT-bigG-14@68B: 81.9%" in printed
    assert re.search(r"irreducible +not determined \(95%: 0 to", printed)
    assert "held-out runs: 4, predicted from 7 others" in printed  # of LAION-2B
    assert "held-out runs: 9, predicted from 27 others" in printed  # of the digits' ladder


def test_convert_gives_pytorchs_numbers(quickstart: Path, monkeypatch: pytest.MonkeyPatch):
    """Of the model that quickstart has trained; and shows by how much other inputs move them."""
    printed = execute("convert", quickstart, monkeypatch)
    for what in ("relative difference:", "of a probability:", "by one pixel:"):
        assert float(re.search(rf"{what} (\S+)", printed)[1]) <= 1e-5
    assert float(re.search(r"mean difference: (\S+)", printed)[1]) > 0.01
    same, arrays = re.search(r"(\d+) of (\d+) arrays are identical", printed).groups()
    assert int(same) == int(arrays) > 20
    verdicts = re.findall(r"^'.*' +(same|\d+) tokens.*$", printed, re.M)
    assert [verdict == "same" for verdict in verdicts] == [True, False, False, True]


def test_free_tpu_uses_all_devices_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "8")  # as many as a v5e-8 has
    printed = execute("free_tpu", tmp_path, monkeypatch)
    assert "8 × cpu" in printed
    assert "mesh data=8 fsdp=1 tensor=1" in printed
    assert re.search(r"^zero_shot/unseen/top1 +[\d.]+%$", printed, re.M)
    for name in ("hugging_face/model.safetensors", "onnx/onnx/vision_model.onnx"):
        assert (tmp_path / "exported" / name).stat().st_size > 0
        assert f"exported/{name}  " in printed
