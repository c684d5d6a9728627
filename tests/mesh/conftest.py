"""Training steps and states for tests that compile complete steps.

Each pytest worker compiles a step only once: see `compiled`.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.losses import ClassifierConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.scaling.grid import grid
from clip_jax.scaling.ladder import load_ladder
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe, State
from tests.conftest import GOLDEN_LOSS, MESHES, OPTIM, ROOT, batch, parameters

# Meshes of fewer than eight devices, with their numbers of devices.
SMALLER_MESHES = {"1": (MeshConfig(), 1), "1x2x2": (MeshConfig(data=1, fsdp=2, tensor=2), 4)}


def recipe(config, **options):
    options = {"objective": (GOLDEN_LOSS,), "optim": OPTIM, "batch_size": 16} | options
    return Recipe(model=config, steps=10, **options)


def mesh_of(name):
    """Return one of MESHES or SMALLER_MESHES."""
    sizes, count = SMALLER_MESHES.get(name) or (MESHES[name], 8)
    return make_mesh(sizes, jax.devices()[:count])


class Step:
    """The compiled training step of a recipe on a mesh."""

    def __init__(self, config, mesh="1", **options):
        self.config = config
        self.program = Program(recipe(config, **options), mesh_of(mesh))
        self.compiled = self.program.step.lower(self.program.state, self.program.batch).compile()

    def start(self, params=None, step=0, frozen=None):
        """Return a state whose optimizer moments are zero."""
        shapes = dataclasses.replace(self.program.state, frozen={})
        state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        params = params or parameters(self.config)
        if names := self.program.recipe.locked:
            frozen = {
                "locked": {"towers": {name: params[name] for name in sorted(names & params.keys())}}
            }
            params = {name: x for name, x in params.items() if name not in names}
        state = State(np.int32(step), params, state.opt_state)
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, shapes))
        return self.program.with_frozen(state, frozen)

    def completed(self, state):
        """Return the parameters of the model, with those of locked towers."""
        return self.program.recipe.complete(state, state.params)

    def adapted(self, scale=0.1):
        """Return a LoRA state: random adapters on the frozen weights of `parameters`."""
        rng, shapes = np.random.default_rng(3), self.program.state.params
        params = jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(x.dtype), shapes)
        return self.start(params, frozen={"lora": {"base": parameters(self.config)}})

    def __call__(self, state=None):
        """Take one step; return the state and metrics, on the host."""
        values = batch(self.config, self.program.recipe.batch_size)
        labels = np.arange(len(values["text"])) % 3
        texts = np.stack([np.roll(values["text"], i, 0) for i in (1, 2)], 1)
        texts[:, :, 0] = 517, 518  # no two are equal: rounding would decide their accuracies
        further = {"further": texts, "further_count": np.int32(labels)}
        inputs = self.program.put(values | {"label": labels} | further)
        return jax.device_get(self.compiled(state or self.start(), inputs))


compiled = functools.cache(Step)  # tests with the same arguments share a compiled step


# ------------------------------------------------------------------ configs of the repository

CONFIGS = sorted((ROOT / "configs").glob("[!_]*.py"))


def read_config(path: Path) -> Config:
    """Return a file's config; a ladder's run with the fewest FLOPs."""
    if not path.stem.startswith("ladder_"):
        config = load_config(path)
        # A classifier without classes would read them from the data.
        objective = (
            dataclasses.replace(x, classes=("a", "b")) if isinstance(x, ClassifierConfig) else x
            for x in config.objective
        )
        return dataclasses.replace(config, objective=tuple(objective))
    return min(grid(load_ladder(path), Path("runs")), key=lambda p: p.training_flops).config


def program_of(config: Config) -> Program:
    """Return a config's program. A ResNet has one block per stage, since further ones are alike."""
    recipe = config.recipe
    if isinstance(vision := recipe.model.vision, ResNetConfig):
        vision = dataclasses.replace(vision, layers=(1, 1, 1, 1))
        model = dataclasses.replace(recipe.model, vision=vision)
        recipe = dataclasses.replace(recipe, model=model)
    return Program(recipe, make_mesh(MeshConfig()))


@pytest.fixture(scope="module")
def in_made(tmp_path_factory):
    """An empty folder, which is the current one: keys of relative paths, on which augmentations
    depend, are the same in every run."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder
