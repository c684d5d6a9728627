"""Adafactor beside big_vision's formula in float64, layer by layer, on a mesh too."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from clip_jax.models.clip import CLIP
from clip_jax.optim import Adafactor, OptimConfig, make_optimizer
from clip_jax.sharding import make_mesh
from tests.conftest import MESHES, TINY
from tests.optim.conftest import RATE, ROWS, UPDATES, beginning, gradients, layers, optimized


def by_formula(param, gradients, *, b1, cap, weight_decay, min_size):
    """Shazeer and Stern's factored moment (algorithm 4) under Zhai et al.'s changes."""
    param, mean = param.astype(np.float64), np.zeros(param.shape)
    order = np.argsort(param.shape)
    is_factored = param.ndim > 1 and param.shape[order[-2]] >= min_size
    row = column = full = 0.0
    for step in range(UPDATES):
        g = gradients[step].astype(np.float64)
        square = g**2 + 1e-30
        decay = min(cap, 1 - (step + 1.0) ** -0.8)
        if is_factored:
            second, first = int(order[-2]), int(order[-1])
            row = decay * row + (1 - decay) * square.mean(first)
            column = decay * column + (1 - decay) * square.mean(second)
            own = second - (second > first)
            nu = np.expand_dims(row / row.mean(own, keepdims=True), first)
            nu = nu * np.expand_dims(column, second)
        else:
            full = decay * full + (1 - decay) * square
            nu = full
        mean = b1 * mean + (1 - b1) * g / np.sqrt(nu)
        param = param - RATE * (mean + weight_decay * param)
    return param


@pytest.mark.parametrize(("min_size", "mesh"), [(8, make_mesh(MESHES["2x2x2"])), (32, None)])
def test_each_layer_is_big_visions(min_size, mesh):
    optim = OptimConfig(optimizer=Adafactor(min_size=min_size), b2=0.9, weight_decay=0.2)
    trees = beginning(), gradients(), optimized(optim, mesh)
    params, steps, got = (layers(tree, apart="depth S") for tree in trees)
    kernels = ("kernel", "proj", "text_projection", "token_embedding", "positional_embedding")
    for name, param in params.items():
        decays = bool(set(kernels) & set(name.split("/")))
        options = {"b1": optim.b1, "cap": 0.9, "weight_decay": 0.2 * decays, "min_size": min_size}
        expected = by_formula(param, steps[name], **options)
        moved = np.abs(expected - param).max()
        assert np.abs(got[name] - expected).max() <= 1e-5 * moved + 2e-7 * np.abs(param).max(), name


@pytest.mark.parametrize("depth", [2, 200])
def test_it_holds_a_momentum_and_little_more(depth):
    config = replace(TINY, text=replace(TINY.text, depth=depth))
    params = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    optim = OptimConfig(optimizer=Adafactor(), first_moment="bfloat16")
    state, *_ = jax.eval_shape(make_optimizer(optim, ROWS).init, params)
    assert {str(x.dtype) for x in jax.tree.leaves(state.mu)} == {"bfloat16"}
    row, column = (x["text"]["transformer"]["resblocks"] for x in (state.nu_row, state.nu_col))
    assert row["mlp"]["c_fc"]["kernel"].shape == (depth, 32, 1)
    assert column["mlp"]["c_fc"]["kernel"].shape == (depth, 1, 128)
    assert row["attn"]["in_proj"]["kernel"].shape == (depth, 32, 3, 2, 16)  # 16 < 32
    assert not jax.tree.leaves(column["attn"]["in_proj"])
    assert state.nu_row["logit_scale"].shape == ()
