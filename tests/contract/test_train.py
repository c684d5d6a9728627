"""A run whose work directory is a bucket: what cannot append there, and how it goes on."""

import json
from unittest import mock

import pytest
from etils import epath

from clip_jax.checkpoint import CheckpointConfig, Checkpoints
from clip_jax.train import Preempted, train
from tests.conftest import tiny_digits


def test_a_run_in_a_bucket_goes_on(gs):
    workdir = epath.Path(gs.url) / "run"
    config = tiny_digits(steps=6, checkpoint=CheckpointConfig(every_steps=100))

    def reached(self: Checkpoints, step: int) -> bool:
        return step == 3

    def steps() -> list[int]:
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        return [row["step"] for row in map(json.loads, lines) if "loss" in row]

    with (
        mock.patch.object(Checkpoints, "reached_preemption", autospec=True, side_effect=reached),
        pytest.raises(Preempted, match=f"saved in {workdir}"),
    ):
        train(config, workdir)
    assert steps() == [1, 2, 3]
    result = train(config, f"{gs.url}/run")
    assert steps() == [1, 2, 3, 4, 5, 6]
    assert json.loads((workdir / "result.json").read_text()) == result
    assert (workdir / "evals/predictions.png").read_bytes()[1:4] == b"PNG"
    assert json.loads((workdir / "config.json").read_text())["steps"] == 6
    assert json.loads((workdir / "starts.json").read_text()) == {"step": 3, "starts": 1}
    names = [path.name for path in (workdir / "tensorboard").iterdir()]
    assert names
    assert all(name.startswith("events") for name in names)
    parts = {name: value for name, value in result.items() if name.startswith("seconds/")}
    total = parts.pop("seconds/total")
    assert sum(parts.values()) == pytest.approx(total)
    assert result["goodput"] == pytest.approx(parts["seconds/steps"] / total)
    assert parts["seconds/compile"] > 0
    assert parts["seconds/restore"] > 0
