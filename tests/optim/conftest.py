"""Parameters, gradients and updates for tests of optimizers."""

import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax import sharding
from clip_jax.convert.state_dict import unflatten
from clip_jax.models.clip import CLIPConfig, Params
from clip_jax.optim import OptimConfig, make_optimizer
from clip_jax.sharding import MeshConfig, make_mesh, path_name
from tests.conftest import TINY, parameters

RATE = 1e-2
UPDATES = 8
ROWS = TINY.dimensions()
# Parameters of every kind: of both towers, and stacked queries, keys and values.
_CHOSEN = re.compile(
    "visual/(conv1|class_emb)|logit_scale|text/(token|positional|text_proj|ln_final/scale)"
    "|text/.*(attn/in_proj|attn/out_proj/kernel|c_fc/kernel|c_proj/bias)"
)


def names_only(config: CLIPConfig) -> Params:
    """Return a model's trainable parameters as arrays whose axes all have length 1."""
    rows = {
        path: row for path, row in config.dimensions().items() if not path.startswith("batch_stats")
    }
    return unflatten({path: jnp.ones((1,) * len(row.split())) for path, row in rows.items()})


def beginning() -> Params:
    """Return some parameters of a tiny model. Their size grows from layer to layer."""
    chosen = {}
    for path, x in jax.tree_util.tree_leaves_with_path(parameters(TINY)):
        if _CHOSEN.match(name := path_name(path)):
            if ROWS[name].startswith("depth"):
                x = x * np.arange(1, len(x) + 1, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
            chosen[name] = x
    return unflatten(chosen)


def gradients() -> Params:
    """Draw gradients for UPDATES updates, stacked. Each parameter's have a scale of their own."""
    rng = np.random.default_rng(2)

    def draw(x):
        scale = 10 ** rng.uniform(-3, 0)
        return (scale * rng.standard_normal((UPDATES, *x.shape))).astype(np.float32)

    return jax.tree.map(draw, beginning())


def optimized(optim: OptimConfig, mesh: Mesh | None = None) -> Params:
    """Return the parameters after updates by `gradients`; all arrays are sharded as in training."""
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    of_all = sharding.param_shardings(TINY, parameters(TINY), mesh)
    of_all = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(of_all)}
    inside = jax.tree_util.tree_map_with_path(lambda p, _: of_all[path_name(p)], beginning())
    stacked = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(None, *x.spec)), inside)
    places = {"in_shardings": (inside, stacked), "out_shardings": inside}
    return followed(make_optimizer(optim, ROWS), beginning(), gradients(), **places)


def layers(tree: Params, apart: str = "depth") -> dict[str, Any]:
    """Return arrays by path and index, split along the dimensions in `apart` (depth, S)."""
    single = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        names = ROWS[path_name(path)].split()
        ahead = x.ndim - len(names)  # gradients are stacked by step
        axes = [i + ahead for i, dim in enumerate(names) if dim in apart.split()]
        for index in itertools.product(*(range(x.shape[axis]) for axis in axes)):
            one = x
            for axis, number in reversed(list(zip(axes, index, strict=True))):
                one = np.take(one, number, axis)
            single["/".join([path_name(path), *map(str, index)])] = one
    return single


def followed(
    optimizer: optax.GradientTransformation, params: Any, gradients: Any, **places: Any
) -> Any:
    """Return the parameters after updates by any optimizer, on the host."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params, learning_rate=RATE)
        return (optax.apply_updates(params, updates), state), None

    def run(params, gradients):
        return jax.lax.scan(update, (params, optimizer.init(params)), gradients)[0][0]

    return jax.device_get(jax.jit(run, **places)(params, gradients))
