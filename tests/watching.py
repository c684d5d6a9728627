"""A made-up run and its watcher, as processes that a test can kill."""

import json
import time
from pathlib import Path

import jax
import numpy as np

from clip_jax import files, retention, watch
from clip_jax.checkpoint import CheckpointConfig, Checkpoints
from clip_jax.config import Config
from clip_jax.evaluate import EvaluateConfig, Measures
from clip_jax.models.clip import CLIP
from clip_jax.serialize import to_dict
from tests.conftest import TINY

BEST = CheckpointConfig(every_steps=1, keep=2, best="made/up", best_of="watcher")


def result(step: int) -> float:
    """What the watcher finds of a step; up and down."""
    return (step * 7 % 11) / 11


def hasten() -> None:
    """Let what usually takes many seconds take few."""
    watch.POLL_SECONDS, retention.RENEW_SECONDS = 0.05, 0.2
    watch.LEASE_SECONDS = retention.LEASE_SECONDS = 5  # longer than a machine stands still


def run(folder: str, last: str, seconds: str) -> None:
    """Save made-up parameters every moment, from where the newest checkpoint is."""
    hasten()
    workdir, steps = Path(folder), int(last)
    config = Config(model=TINY, steps=steps, checkpoint=BEST)
    files.write_whole(workdir / "config.json", json.dumps(to_dict(config)))
    shapes = jax.eval_shape(CLIP(TINY).init, jax.random.key(0))
    checkpoints = Checkpoints(workdir / "checkpoints", BEST)
    for step in range((checkpoints.latest_step() or 0) + 1, steps + 1):
        arrays = jax.tree.map(
            lambda x, s=step: jax.device_put(np.full(x.shape, s, x.dtype)), shapes
        )
        checkpoints.save(step, {"params": arrays}, {"samples": step})
        time.sleep(float(seconds))
    checkpoints.close()


def evaluate(folder: str, seconds: str) -> None:
    """Watch; but of a checkpoint only look whose step it is."""
    hasten()

    def of(measures: Measures, encoder, output) -> dict[str, float]:
        del measures, output
        step = int(encoder.params["visual"]["proj"][0, 0])
        time.sleep(float(seconds))
        return {"made/up": result(step), "made/step": float(step)}

    Measures.of = of
    watch.watch(EvaluateConfig(model=Path(folder)))
