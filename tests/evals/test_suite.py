"""What is said before data sets are read. Runs that measure them: see tests/mesh."""

import pytest

from clip_jax.errors import InputError
from clip_jax.evals.catalog import data_sets
from clip_jax.evals.suite import SuiteEvalConfig
from tests.evals.conftest import write_folder


def test_wrong_use_is_said_before_training(tmp_path):
    write_folder(animals := tmp_path / "zoo/animals", ["ant", "bee"])
    with pytest.raises(InputError, match="imagenet1k is not in"):
        SuiteEvalConfig(dataset=("imagenet1k",), data_dir=str(tmp_path)).make()
    with pytest.raises(InputError, match=r"evals\.memory_mib=-1"):
        SuiteEvalConfig(memory_mib=-1)
    with pytest.raises(InputError, match=f"two data sets are called {animals.parent.name}"):
        data_sets((f"folder:{animals}",) * 2, "data")
    missing = SuiteEvalConfig(dataset=("imagenet1k",), data_dir=str(tmp_path), missing="skip")
    assert missing.make().names == ()
