"""Whole steps on several meshes, of every family, and runs from start to end in one process.

Steps are compiled once a worker: see `compiled`.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.losses import ClassifierConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.scaling.grid import grid
from clip_jax.scaling.ladder import load_ladder
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe, State
from tests.conftest import GOLDEN_LOSS, MESHES, OPTIM, ROOT, batch, parameters

# Beside those of eight devices, with their numbers of devices.
SMALLER_MESHES = {"1": (MeshConfig(), 1), "1x2x2": (MeshConfig(data=1, fsdp=2, tensor=2), 4)}


def recipe(config, **options):
    options = {"objective": (GOLDEN_LOSS,), "optim": OPTIM, "batch_size": 16} | options
    return Recipe(model=config, steps=10, **options)


def mesh_of(name):
    """One of MESHES or SMALLER_MESHES."""
    sizes, count = SMALLER_MESHES.get(name) or (MESHES[name], 8)
    return make_mesh(sizes, jax.devices()[:count])


class Step:
    """A recipe on a mesh, by default of one device, with its compiled step."""

    def __init__(self, config, mesh="1", **options):
        self.config = config
        self.program = Program(recipe(config, **options), mesh_of(mesh))
        self.compiled = self.program.step.lower(self.program.state, self.program.batch).compile()

    def start(self, params=None, step=0, frozen=None):
        """A state with all moments zero."""
        shapes = dataclasses.replace(self.program.state, frozen={})
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        state = State(np.int32(step), params or parameters(self.config), state.opt_state)
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
        return self.program.with_frozen(state, frozen)

    def adapted(self, scale=0.1):
        """A state whose arrays to train are random, and the others those of `parameters`."""
        rng, shapes = np.random.default_rng(3), self.program.state.params
        params = jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(x.dtype), shapes)
        return self.start(params, frozen={"lora": {"base": parameters(self.config)}})

    def __call__(self, state=None):
        """State and metrics after one more step, on the host."""
        values = batch(self.config, self.program.recipe.batch_size)
        inputs = self.program.put(values | {"label": np.arange(len(values["text"])) % 3})
        return jax.device_get(self.compiled(state or self.start(), inputs))


compiled = functools.cache(Step)  # the same step for all tests that take it


# ------------------------------------------------------------------ configs that ship

CONFIGS = sorted((ROOT / "configs").glob("[!_]*.py"))


def read_config(path: Path) -> Config:
    """A config, or of a ladder the run of the least FLOPs."""
    if not path.stem.startswith("ladder_"):
        config = load_config(path)
        objective = (
            dataclasses.replace(x, classes=("a", "b")) if isinstance(x, ClassifierConfig) else x
            for x in config.objective
        )
        return dataclasses.replace(config, objective=tuple(objective))  # else the data's classes
    return min(grid(load_ladder(path), Path("runs")), key=lambda p: p.training_flops).config


def program_of(config: Config) -> Program:
    """The config's program; a ResNet's with one block a stage, since further blocks are alike."""
    recipe = config.recipe
    if isinstance(vision := recipe.model.vision, ResNetConfig):
        vision = dataclasses.replace(vision, layers=(1, 1, 1, 1))
        model = dataclasses.replace(recipe.model, vision=vision)
        recipe = dataclasses.replace(recipe, model=model)
    return Program(recipe, make_mesh(MeshConfig()))
