"""Muon beside optax.contrib.muon, layer by layer, query, key and value apart."""

import dataclasses

import numpy as np
import optax
import pytest

from clip_jax.models.dimensions import table
from clip_jax.optim import Muon, OptimConfig
from clip_jax.optim.matrices import stack_of
from tests.conftest import TINY
from tests.optim.conftest import RATE, beginning, followed, gradients, layers, optimized

OPTIM = OptimConfig(optimizer=Muon(rms=None), weight_decay=0.0, b2=0.95)
# Five iterations multiply what rounding leaves of a small singular value by 3.4 each.
TOLERANCE = 1e-4


def matrices(tree):
    """Linear maps as matrices [steps.. inputs outputs], all else as it is."""
    rows, found = table(TINY), {}
    for name, x in layers(tree, apart="depth S").items():
        path = name.rstrip("0123456789/")
        names = [dim for dim in rows[path].split() if dim not in ("depth", "S")]
        if stack := stack_of(names):
            ahead = x.shape[: x.ndim - len(names)]
            x = x.reshape(*ahead, *stack.sizes(x.shape[len(ahead) :]))
        found[name] = x
    return found


def linear(params):
    return {
        name: bool(stack_of(table(TINY)[name.rstrip("0123456789/")].split())) for name in params
    }


def check_follows(optim, theirs, params):
    """Every matrix goes where optax's takes it, up to a share of how far it goes."""
    expected = followed(theirs, params, matrices(gradients()))
    got = matrices(optimized(optim))
    for name, x in expected.items():
        moved = np.abs(x - params[name]).max()
        assert np.abs(got[name] - x).max() <= TOLERANCE * moved, name


@pytest.mark.long
@pytest.mark.parametrize(("nesterov", "rms"), [(True, None), (False, 0.2)])
def test_each_layer_is_optaxs(nesterov, rms):
    optim = dataclasses.replace(OPTIM, optimizer=Muon(rms=rms, nesterov=nesterov))
    params = matrices(beginning())
    names = linear(params)
    theirs = optax.contrib.muon(
        RATE, eps=OPTIM.eps, nesterov=nesterov, consistent_rms=rms, adam_b1=OPTIM.b1,
        adam_b2=OPTIM.b2, muon_weight_dimension_numbers={
            name: optax.contrib.MuonDimensionNumbers() if is_linear else None
            for name, is_linear in names.items()
        },
    )  # fmt: skip
    check_follows(optim, theirs, params)
    of_block = {name.rpartition("resblocks/")[2] for name in names if names[name]}
    assert {f"attn/in_proj/kernel/1/{qkv}" for qkv in range(3)} < of_block
    assert not any("embedding" in name or "conv1" in name for name in of_block)


@pytest.mark.long
def test_decay_and_the_rates_of_the_rest():
    optim = dataclasses.replace(
        OPTIM, optimizer=Muon(nesterov=False, adam_rate=0.1), weight_decay=0.5
    )
    params = matrices(beginning())
    names = linear(params)
    given = {"b1": OPTIM.b1, "b2": OPTIM.b2, "eps": OPTIM.eps}
    mask = {"kernel", "proj", "text_projection", "token_embedding", "positional_embedding"}
    decays = {name: bool(mask & set(name.split("/"))) for name in params}
    theirs = optax.partition(
        {
            True: optax.contrib.muon(
                RATE, eps=OPTIM.eps, nesterov=False, consistent_rms=0.2, weight_decay=0.5
            ),
            False: optax.adamw(
                0.1 * RATE, **given, weight_decay=0.5,
                mask=lambda params: {name: decays[name] for name in params},
            ),
        },
        names,
    )  # fmt: skip
    check_follows(optim, theirs, params)
