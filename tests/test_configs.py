"""Every config that ships traces a step, without computing it."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from clip_jax import sharding
from clip_jax.config import Config, load_config
from clip_jax.ladder import grid, load_ladder
from clip_jax.models.clip import CLIP
from clip_jax.optim import make_optimizer
from clip_jax.step import init_state, train_step
from tests.runs import ROOT


def read(path: Path) -> Config:
    """A config, or of a ladder the run of the least FLOPs."""
    if not path.stem.startswith("ladder_"):
        return load_config(path)
    return min(grid(load_ladder(path), Path("runs")), key=lambda p: p.training_flops).config


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem
)
def test_a_step_traces(path):
    config = read(path)
    model, optimizer = CLIP(config.model), make_optimizer(config.optim, config.steps)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    sharding.check_batch_size(config.batch_size, mesh)
    state = jax.eval_shape(functools.partial(init_state, jax.random.key(0), model, optimizer))
    size, length = config.model.vision.image_size, config.model.text.context_length
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.uint8),
        "text": jax.ShapeDtypeStruct((config.batch_size, length), jnp.int32),
    }
    step = functools.partial(
        train_step, model=model, optim=config.optim, steps=config.steps, loss=config.loss, mesh=mesh
    )
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()
