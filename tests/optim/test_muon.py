"""Muon beside optax.contrib.muon, layer by layer, query, key and value apart, on a mesh too."""

import math

import numpy as np
import optax
import pytest

from clip_jax.optim import Muon, OptimConfig
from clip_jax.optim.matrices import matrix_of
from clip_jax.sharding import make_mesh
from tests.conftest import MESHES
from tests.optim.conftest import RATE, ROWS, beginning, followed, gradients, layers, optimized

# Five iterations multiply what rounding leaves of a small singular value by 3.4 each.
TOLERANCE = 1e-4


def matrices(tree):
    """Linear maps as matrices [steps.. inputs outputs], all else as it is."""
    single = {}
    for name, x in layers(tree, apart="depth S").items():
        path = name.rstrip("0123456789/")
        names = [dim for dim in ROWS[path].split() if dim not in ("depth", "S")]
        if axes := matrix_of(names):
            of_names = x.shape[x.ndim - len(names) :]
            sizes = [math.prod(of_names[i] for i in side) for side in axes]
            x = x.reshape(*x.shape[: x.ndim - len(names)], *sizes)
        single[name] = x
    return single


@pytest.mark.parametrize(
    ("muon", "decay", "mesh"),
    [
        (Muon(rms=None), 0.0, make_mesh(MESHES["2x2x2"])),
        (Muon(nesterov=False, adam_learning_rate_scale=0.1), 0.5, None),
    ],
)
def test_each_layer_is_optaxs(muon, decay, mesh):
    """Every matrix goes where optax's takes it, up to a share of how far it goes."""
    optim = OptimConfig(optimizer=muon, weight_decay=decay, b2=0.95)
    params = matrices(beginning())
    is_linear = {name: bool(matrix_of(ROWS[name.rstrip("0123456789/")].split())) for name in params}
    weights = {"kernel", "proj", "text_projection", "token_embedding", "positional_embedding"}
    decays = {name: bool(weights & set(name.split("/"))) for name in params}
    both = {"eps": optim.eps, "weight_decay": decay, "nesterov": muon.nesterov}
    rest = optax.adamw(
        muon.adam_learning_rate_scale * RATE, b1=optim.b1, b2=optim.b2, **both, mask=decays
    )
    theirs = optax.contrib.muon(RATE, consistent_rms=muon.rms, **both)
    theirs = optax.partition({True: theirs, False: rest}, is_linear)
    expected = followed(theirs, params, matrices(gradients()))
    got = matrices(optimized(optim, mesh))
    for name, x in expected.items():
        moved = np.abs(x - params[name]).max()
        assert np.abs(got[name] - x).max() <= TOLERANCE * moved, name
    of_block = {name.rpartition("resblocks/")[2] for name in params if is_linear[name]}
    assert {f"attn/in_proj/kernel/1/{qkv}" for qkv in range(3)} < of_block
    assert not any("embedding" in name or "conv1" in name for name in of_block)
