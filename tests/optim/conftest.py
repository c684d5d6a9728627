"""What tests of optimizers build: parameters, gradients, and where twenty updates lead."""

import itertools
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax import sharding
from clip_jax.models.clip import CLIPConfig, Params, split_batch_stats
from clip_jax.models.dimensions import table
from clip_jax.optim import OptimConfig, make_optimizer
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Recipe, shapes
from tests.conftest import GOLDEN_LOSS, TINY, parameters

RATE = 1e-2
UPDATES = 20


def beginning(config: CLIPConfig = TINY) -> Params:
    """Trainable parameters; each layer's are larger than those of the one before."""
    rows = table(config)

    def scaled(path, x):
        if not rows[sharding.path_name(path)].startswith("depth"):
            return x
        return x * np.arange(1, len(x) + 1, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))

    params, _ = split_batch_stats(parameters(config))
    return jax.tree_util.tree_map_with_path(scaled, params)


def gradients(config: CLIPConfig = TINY) -> Params:
    """Twenty gradients of a tiny model from NumPy, stacked; each array has its own scale."""
    rng = np.random.default_rng(2)

    def draw(x):
        scale = 10 ** rng.uniform(-3, 0)
        return (scale * rng.standard_normal((UPDATES, *x.shape))).astype(np.float32)

    return jax.tree.map(draw, beginning(config))


def optimized(optim: OptimConfig, mesh: Mesh | None = None, config: CLIPConfig = TINY) -> Params:
    """A tiny model's parameters after twenty of our updates by `gradients`, where they lie."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    recipe = Recipe(model=config, loss=GOLDEN_LOSS, optim=optim, steps=UPDATES, batch_size=16)
    places = jax.tree.map(lambda x: x.sharding, shapes(recipe, mesh)[0])
    inside, _ = split_batch_stats(places.params)
    stacked = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(None, *x.spec)), inside)
    optimizer = make_optimizer(optim, table(config))

    def update(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params, rate=RATE)
        return (optax.apply_updates(params, updates), state), None

    def run(params, gradients):
        (params, _), _ = jax.lax.scan(update, (params, optimizer.init(params)), gradients)
        return params

    run = jax.jit(run, in_shardings=(inside, stacked), out_shardings=inside)
    return jax.device_get(run(beginning(config), gradients(config)))


def layers(tree: Params, config: CLIPConfig = TINY, apart: str = "depth") -> dict[str, Any]:
    """Arrays by path; those that `apart` stacks (depth, S) one by one, by number.

    The image tower's blocks, which are like the text's, are left out.
    """
    rows, found = table(config), {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = sharding.path_name(path)
        if name.startswith("visual/transformer"):
            continue
        names = rows[name].split()
        ahead = x.ndim - len(names)  # of gradients, the steps
        axes = [i + ahead for i, dim in enumerate(names) if dim in apart.split()]
        for index in itertools.product(*(range(x.shape[axis]) for axis in axes)):
            one = x
            for axis, place in reversed(list(zip(axes, index, strict=True))):
                one = np.take(one, place, axis)
            found["/".join([name, *map(str, index)])] = one
    return found


def followed(optimizer: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    """Parameters after twenty updates of another optimizer."""

    @jax.jit
    def update(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for step in range(UPDATES):
        params, state = update(params, state, jax.tree.map(lambda x, i=step: x[i], gradients))
    return jax.device_get(params)
