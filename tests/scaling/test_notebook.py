"""The notebook runs from top to bottom and is the same in both of its files."""

from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return nbformat.read(NOTEBOOKS / "scaling.ipynb", as_version=4)


def test_both_files_say_the_same(notebook: nbformat.NotebookNode):
    text = jupytext.read(NOTEBOOKS / "scaling.py")
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in text.cells
    ]


# Libraries of the kernel's own, not ours.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_it_runs_and_draws(notebook: nbformat.NotebookNode, monkeypatch: pytest.MonkeyPatch):
    # The kernel is another process in another directory: it must find this checkout.
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.get("text", "") for output in outputs)
    assert "ImageNet                              LAION  -0.1114   5.858" in printed
    assert "OpenAI  -0.2378   211.7" in printed
    assert "ViT-bigG-14@68B: 81.9%" in printed
    assert "not determined by these runs" in printed
    drawn = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(drawn) == 3
