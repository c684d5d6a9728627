"""Muon beside optax.contrib.muon, layer by layer, query, key and value apart, on a mesh too."""

import dataclasses

import numpy as np
import optax

from clip_jax.optim import Muon, OptimConfig
from clip_jax.optim.matrices import stack_of
from clip_jax.sharding import make_mesh
from tests.conftest import MESHES
from tests.optim.conftest import RATE, ROWS, beginning, followed, gradients, layers, optimized

OPTIM = OptimConfig(optimizer=Muon(rms=None), weight_decay=0.0, b2=0.95)
# Five iterations multiply what rounding leaves of a small singular value by 3.4 each.
TOLERANCE = 1e-4


def matrices(tree):
    """Linear maps as matrices [steps.. inputs outputs], all else as it is."""
    single = {}
    for name, x in layers(tree, apart="depth S").items():
        path = name.rstrip("0123456789/")
        names = [dim for dim in ROWS[path].split() if dim not in ("depth", "S")]
        if stack := stack_of(names):
            ahead = x.shape[: x.ndim - len(names)]
            x = x.reshape(*ahead, *stack.sizes(x.shape[len(ahead) :]))
        single[name] = x
    return single


def linear(params):
    return {name: bool(stack_of(ROWS[name.rstrip("0123456789/")].split())) for name in params}


def check_follows(optim, theirs, params, mesh=None):
    """Every matrix goes where optax's takes it, up to a share of how far it goes."""
    expected = followed(theirs, params, matrices(gradients()))
    got = matrices(optimized(optim, mesh))
    for name, x in expected.items():
        moved = np.abs(x - params[name]).max()
        assert np.abs(got[name] - x).max() <= TOLERANCE * moved, name


def test_each_layer_is_optaxs_on_a_mesh():
    params = matrices(beginning())
    names = linear(params)
    theirs = optax.contrib.muon(
        RATE, eps=OPTIM.eps, nesterov=True, consistent_rms=None, adam_b1=OPTIM.b1,
        adam_b2=OPTIM.b2, muon_weight_dimension_numbers={
            name: optax.contrib.MuonDimensionNumbers() if is_linear else None
            for name, is_linear in names.items()
        },
    )  # fmt: skip
    check_follows(OPTIM, theirs, params, make_mesh(MESHES["2x2x2"]))
    of_block = {name.rpartition("resblocks/")[2] for name in names if names[name]}
    assert {f"attn/in_proj/kernel/1/{qkv}" for qkv in range(3)} < of_block
    assert not any("embedding" in name or "conv1" in name for name in of_block)


def test_decay_the_rates_of_the_rest_and_no_nesterov():
    optim = dataclasses.replace(
        OPTIM, optimizer=Muon(nesterov=False, adam_rate=0.1), weight_decay=0.5
    )
    params = matrices(beginning())
    names = linear(params)
    given = {"b1": OPTIM.b1, "b2": OPTIM.b2, "eps": OPTIM.eps}
    mask = {"kernel", "proj", "text_projection", "token_embedding", "positional_embedding"}
    decays = {name: bool(mask & set(name.split("/"))) for name in params}

    def decayed(params):
        return {name: decays[name] for name in params}

    theirs = optax.partition(
        {
            True: optax.contrib.muon(
                RATE, eps=OPTIM.eps, nesterov=False, consistent_rms=0.2, weight_decay=0.5
            ),
            False: optax.adamw(
                0.1 * RATE, **given, weight_decay=0.5,
                mask=decayed,
            ),
        },
        names,
    )  # fmt: skip
    check_follows(optim, theirs, params)
