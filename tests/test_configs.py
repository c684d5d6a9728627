"""Every config that ships is valid; `tests/mesh/test_configs.py` traces their steps."""

import pytest

from clip_jax.evals.suite import SuiteEvalConfig
from tests.mesh.conftest import CONFIGS, read_config


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_valid_and_measures_real_data_by_the_suite(path):
    config = read_config(path)
    real = isinstance(getattr(config.data.source, "path", None), str)
    assert not real or any(isinstance(x, SuiteEvalConfig) for x in config.evals)
