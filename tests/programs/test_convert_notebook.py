"""`notebooks/convert.ipynb` runs: it needs PyTorch, and so its test is here."""

import re

import pytest

from tests.conftest import ROOT, execute_notebook

# Libraries of the kernel's own, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_convert_says_the_same_in_pytorch_and_shows_where_inputs_differ(tmp_path, monkeypatch):
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # trains under the root above its folder
    monkeypatch.setenv("CLIP_JAX_NOTEBOOK_STEPS", "8")
    printed, drawn = execute_notebook("convert", tmp_path, monkeypatch)
    assert len(drawn) == 2
    assert float(re.search(r"relative difference: (\S+)", printed)[1]) <= 1e-5
    assert float(re.search(r"of a probability: (\S+)", printed)[1]) <= 1e-5
    same, arrays = re.search(r"(\d+) of (\d+) arrays are the same bits", printed).groups()
    assert same == arrays
    assert int(arrays) > 20
    assert float(re.search(r"mean difference (\S+)", printed)[1]) > 0.01
    assert float(re.search(r"moved by a pixel (\S+)", printed)[1]) <= 1e-5
    verdicts = re.findall(r"^'(.*)' +(same|\d+ tokens here, \d+ there)$", printed, re.M)
    assert [verdict == "same" for _, verdict in verdicts] == [True, False, False, True]
