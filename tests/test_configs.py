"""Every config that ships is valid; `tests/mesh/test_configs.py` traces their steps."""

import ast
import re

import pytest

from clip_jax.evals.suite import SuiteEvalConfig
from tests.conftest import ROOT
from tests.mesh.conftest import CONFIGS, read_config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_valid_and_measures_real_data_by_the_suite(path):
    config = read_config(path)
    real = isinstance(getattr(config.data.source, "path", None), str)
    assert not real or any(isinstance(x, SuiteEvalConfig) for x in config.evals)


def test_the_readmes_table_repeats_the_configs_and_the_benchmarks():
    row = r"^\| `(\w+)` \| (\S+) \| ([\d,]+) \| (\d+)% \| ([\d.]+) \| (\$[\d,]+) \| ([\d.–]+)%"
    rows = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    assert len(rows) >= 6
    measured = (ROOT / "BENCHMARKS.md").read_text()
    for name, topology, batch, mfu, hours, price, accuracies in rows:
        path = ROOT / f"configs/{name}.py"
        text = " ".join(ast.get_docstring(ast.parse(path.read_text())).split())
        assert f"{read_config(path).batch_size:,}" == batch
        assert f"clip-jax plan {name} --topology {topology} " in text
        assert f"{hours} hours at an assumed 40% MFU, {price} at" in text
        assert all(f"{accuracy}%" in text for accuracy in accuracies.split("–"))
        plan = re.search(rf"^\|[^|]*`{name}` \| {topology} \| {batch} \|.*", measured, re.M)[0]
        assert f" ({mfu}) " in plan
        assert re.search(rf"\b{hours} \| ([\d.]+; )?{price[1:]} \|$", plan)
