"""LAMB on a mesh beside optax's, layer by layer."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from clip_jax.optim import LAMB, OptimConfig
from clip_jax.optim.lamb import scale_by_trust_ratio
from clip_jax.sharding import make_mesh
from tests.conftest import MESHES, assert_close
from tests.optim.conftest import RATE, beginning, followed, gradients, layers, optimized

OPTIM = OptimConfig(optimizer=LAMB(), weight_decay=0.2)


def test_each_layer_is_optaxs_and_gains_biases_and_scalars_have_a_ratio_of_1():
    small = {"scale", "bias", "gamma", "class_embedding"}

    def labels(params):
        return {name: "logit" not in name and not small & set(name.split("/")) for name in params}

    both = {"b1": OPTIM.b1, "b2": OPTIM.b2, "eps": OPTIM.eps}
    lamb = optax.lamb(RATE, **both, weight_decay=OPTIM.weight_decay)
    adamw = optax.adamw(RATE, **both, weight_decay=0.0)
    theirs = optax.partition({True: lamb, False: adamw}, labels)
    params = layers(beginning())
    adapted = {name for name, adapts in labels(params).items() if adapts}
    assert adapted > {"text/transformer/resblocks/mlp/c_fc/kernel/1", "text/token_embedding"}
    expected = followed(theirs, params, layers(gradients()))
    assert_close(expected, layers(optimized(OPTIM, make_mesh(MESHES["2x2x2"]))))


@pytest.mark.parametrize(("param", "update"), [(0.0, 3.0), (2.0, 0.0), (0.0, 0.0), (2.0, 3.0)])
def test_updates_have_the_norm_of_their_layer_unless_one_of_the_norms_is_zero(param, update):
    names = "depth D E"
    params: Any = {"kernel": jnp.array([[[param] * 2] * 3, [[1.0] * 2] * 3])}
    updates: Any = {"kernel": jnp.array([[[update] * 2] * 3, [[-5.0] * 2] * 3])}
    transform = scale_by_trust_ratio({"kernel": names}, lambda params: {"kernel": True})
    scaled: Any = transform.update(updates, transform.init(params), params)[0]
    wanted = np.sign(update) * param if param and update else update
    np.testing.assert_allclose(scaled["kernel"][0], wanted, rtol=1e-6)
    np.testing.assert_allclose(scaled["kernel"][1], -1.0, rtol=1e-6)
