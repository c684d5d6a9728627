"""Every config that ships traces a step, without computing it."""

import dataclasses
from pathlib import Path

import jax
import pytest

from clip_jax import sharding
from clip_jax.config import Config, load_config
from clip_jax.evals import evaluator
from clip_jax.evals.tasks import SuiteEvalConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.scaling.ladder import grid, load_ladder
from clip_jax.step import Program
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.py"))


def read(path: Path) -> Config:
    """A config, or of a ladder the run of the least FLOPs."""
    if not path.stem.startswith("ladder_"):
        return load_config(path)
    return min(grid(load_ladder(path), Path("runs")), key=lambda p: p.training_flops).config


def program(config: Config) -> Program:
    """The config's program; a ResNet's with one block a stage, since further blocks are alike."""
    recipe = config.recipe
    if isinstance(vision := recipe.model.vision, ResNetConfig):
        vision = dataclasses.replace(vision, layers=(1, 1, 1, 1))
        model = dataclasses.replace(recipe.model, vision=vision)
        recipe = dataclasses.replace(recipe, model=model)
    return Program(recipe, sharding.make_mesh(sharding.MeshConfig()))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_step_traces(path):
    config = read(path)
    run = program(config)
    after, metrics = jax.eval_shape(run.step, run.state, run.batch)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (after, run.state)]
    assert shapes[0] == shapes[1]
    assert metrics["loss"].shape == ()
    real = isinstance(getattr(config.data.source, "path", None), str)
    assert not real or any(isinstance(x, SuiteEvalConfig) for x in config.evals)


@pytest.mark.parametrize("name", ["rn50", "vit_b16", "siglip_b16", "coca_l14", "mammut_l14"])
def test_evaluation_traces_on_the_mesh_with_the_parameters_where_the_step_has_them(name):
    config = read(ROOT / f"configs/{name}.py")
    assert config.evals
    run = program(config)
    image = evaluator.image_encoder(run.model, run.mesh, normalize=True)
    text = evaluator.text_encoder(run.model, run.mesh)
    images = jax.eval_shape(image, run.state.params, run.batch["image"])
    texts = jax.eval_shape(text, run.state.params, run.batch["text"])
    assert images.shape == texts.shape == (config.batch_size, config.model.embed_dim)
