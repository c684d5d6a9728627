"""A start downloads weights in a bucket once, whatever needs them."""

from unittest import mock

import pytest
from etils import epath

from clip_jax.checkpoints.claim import Claim
from clip_jax.convert.weight_files import WeightFiles
from clip_jax.storage import files
from clip_jax.train import Preempted, set_up
from tests.conftest import STARTS, starting_from, tiny_digits, write_tiny_model


@pytest.mark.parametrize("kind", STARTS)
def test_a_start_downloads_weights_once(kind, gs, tmp_path):
    write_tiny_model(tmp_path / "weights", config=tiny_digits().model)
    url, name = f"{gs.url}/weights", "model.safetensors"
    files.copy_tree(tmp_path / "weights", files.as_path(url))
    config = starting_from(url, kind, tmp_path / "images")
    gs.server.requests()
    with WeightFiles() as weight_files:
        run = set_up(config, epath.Path(tmp_path / "run"), mock.Mock(spec=Claim), weight_files)
    run.checkpoints.close()
    run.reports.close(Preempted)
    sent = [x for x in gs.server.requests() if "safetensors" in x["path"] and x["method"] == "GET"]
    assert sum(x["bytes"] for x in sent) == (tmp_path / "weights" / name).stat().st_size
