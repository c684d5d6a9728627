"""Every config that ships can start; of each kind one traces a step, without computing it."""

import dataclasses
from pathlib import Path

import jax
import pytest

from clip_jax import sharding
from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.evals import evaluator
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import ClassifierConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.scaling.grid import grid
from clip_jax.scaling.ladder import load_ladder
from clip_jax.step import Program
from tests.conftest import ROOT

CONFIGS = sorted((ROOT / "configs").glob("[!_]*.py"))


def read(path: Path) -> Config:
    """A config, or of a ladder the run of the least FLOPs."""
    if not path.stem.startswith("ladder_"):
        config = load_config(path)
        objective = (
            dataclasses.replace(x, classes=("a", "b")) if isinstance(x, ClassifierConfig) else x
            for x in config.objective
        )
        return dataclasses.replace(config, objective=tuple(objective))  # else the data's classes
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
def test_a_state_is_traced_and_laid_out(path):
    config = read(path)
    run = program(config)
    assert {x.shape[0] for x in jax.tree.leaves(run.batch["image"])} == {config.batch_size}
    assert all(x.sharding.mesh == run.mesh for x in jax.tree.leaves(run.state))
    real = isinstance(getattr(config.data.source, "path", None), str)
    assert not real or any(isinstance(x, SuiteEvalConfig) for x in config.evals)


# One of each kind of tower, pool, decoder, loss, remat policy and gradient clipping.
@pytest.mark.parametrize(
    "name",
    [
        *("clipa_l14", "coca_l14", "digits", "mammut_l14", "pairs", "rn50x64", "siglip2_b16"),
        *("convnext_large", "eva02_l14", "pe_core_l14", "shapes_naflex", "vit_l14"),
    ],
)
def test_a_step_and_evaluation_trace(name):
    config = read(ROOT / f"configs/{name}.py")
    run = program(config)
    after, metrics = jax.eval_shape(run.step, run.state, run.batch)
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), state) for state in (after, run.state)]
    assert shapes[0] == shapes[1]
    assert metrics["loss"].shape == ()
    # On the mesh, with the parameters where the step has them.
    image = evaluator.compiled(evaluator.embed_images, run.model, run.mesh)
    text = evaluator.compiled(evaluator.embed_texts, run.model, run.mesh)
    images = jax.eval_shape(image, run.state.params, run.batch["image"])
    texts = jax.eval_shape(text, run.state.params, run.batch["text"])
    assert images.shape == texts.shape == (config.batch_size, config.model.embed_dim)
