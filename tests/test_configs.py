"""Every config that ships traces a step, without computing it."""

from pathlib import Path

import jax
import pytest

from clip_jax import sharding
from clip_jax.config import Config, load_config
from clip_jax.evals import evaluator
from clip_jax.evals.tasks import SuiteEvalConfig
from clip_jax.scaling.ladder import grid, load_ladder
from clip_jax.step import Program
from tests.conftest import ROOT


def read(path: Path) -> Config:
    """A config, or of a ladder the run of the least FLOPs."""
    if not path.stem.startswith("ladder_"):
        return load_config(path)
    return min(grid(load_ladder(path), Path("runs")), key=lambda p: p.training_flops).config


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[pytest.mark.long] if path.stem == "rn50x64" else [])
        for path in sorted((ROOT / "configs").glob("*.py"))
    ],
    ids=lambda path: path.stem,
)
def test_a_step_traces(path):
    config = read(path)
    program = Program(config.recipe, sharding.make_mesh(sharding.MeshConfig()))
    state = program.state
    after, metrics = jax.eval_shape(program.step, state, program.batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics["loss"].shape == ()
    if config.evals:  # as they run on the mesh, with the parameters where the step has them
        image, text = (getattr(evaluator, f"{name}_encoder") for name in ("image", "text"))
        images = image(program.model, program.mesh, normalize=True)
        features = jax.eval_shape(images, state.params, program.batch["image"])
        texts = jax.eval_shape(
            text(program.model, program.mesh), state.params, program.batch["text"]
        )
        assert features.shape == texts.shape == (config.batch_size, config.model.embed_dim)
    real = isinstance(getattr(config.data.source, "path", None), str)
    assert not real or any(isinstance(x, SuiteEvalConfig) for x in config.evals)
