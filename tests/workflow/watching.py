"""A made-up run and its watcher, as processes that a test can kill. Both say what they do."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np

from clip_jax.checkpoints.manager import CheckpointConfig, Checkpoints
from clip_jax.clock import Clock
from clip_jax.config import Config
from clip_jax.inference import watch
from clip_jax.inference.evaluate import EvaluateConfig, Evaluators
from clip_jax.metrics.tracking import Writer
from clip_jax.models.clip import CLIP
from clip_jax.serialize import to_dict
from clip_jax.storage import files
from tests.conftest import TINY

STEPS = 12
BEST = CheckpointConfig(every_steps=1, keep=2, best="made/up", best_of="watcher")


def result(step: int) -> float:
    """What the watcher finds of a step; up and down."""
    return (step * 7 % 11) / 11


def run(folder: str) -> None:
    """Save made-up parameters, from where the newest checkpoint is; a byte lets it do each step."""
    workdir, allowed = Path(folder), os.open(f"{folder}.steps", os.O_RDONLY)
    config = Config(model=TINY, steps=STEPS, checkpoint=BEST)
    files.write_whole(workdir / "config.json", json.dumps(to_dict(config)))
    shapes = jax.eval_shape(CLIP(TINY).init, jax.random.key(0))
    checkpoints = Checkpoints(workdir / "checkpoints", BEST)
    for step in range((checkpoints.latest_step() or 0) + 1, STEPS + 1):
        os.read(allowed, 1)
        print(f"saving {step}", flush=True)
        arrays = jax.tree.map(
            lambda x, s=step: jax.device_put(np.full(x.shape, s, x.dtype)), shapes
        )
        checkpoints.save(step, {"params": arrays}, {"samples": step})
        checkpoints.wait()
        print(f"saved {step}", flush=True)
    checkpoints.close()


class Impatient(Clock):
    """Looks for checkpoints often."""

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds / 100)


def evaluate(folder: str) -> None:
    """Watch; but of a checkpoint only look whose step it is."""

    def run(evaluators: Evaluators, encoder: Any, output: Any) -> dict[str, float]:
        del evaluators, output
        step = int(encoder.params["visual"]["proj"][0, 0])
        return {"made/up": result(step), "made/step": float(step)}

    def write(writer: Writer, step: int, values: Mapping[str, Any]) -> None:
        plain(writer, step, values)
        print(f"row {step}", flush=True)

    plain = Writer.write
    with mock.patch.object(Writer, "write", write), mock.patch.object(Evaluators, "run", run):
        watch.watch(EvaluateConfig(model=Path(folder)), Impatient())


if __name__ == "__main__":
    {"run": run, "evaluate": evaluate}[sys.argv[1]](sys.argv[2])
