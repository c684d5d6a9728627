"""LAMB on a mesh beside optax's, layer by layer."""

import optax

from clip_jax.optim import LAMB, OptimConfig
from clip_jax.sharding import make_mesh
from tests.conftest import MESHES, assert_close
from tests.optim.conftest import RATE, beginning, followed, gradients, layers, optimized

OPTIM = OptimConfig(optimizer=LAMB(), weight_decay=0.2)


def test_each_layer_is_optaxs_and_gains_biases_and_scalars_have_a_ratio_of_1():
    small = ("scale", "bias", "gamma", "class_embedding")

    def labels(params):
        return {
            name: "adamw" if set(small) & set(name.split("/")) or "logit" in name else "lamb"
            for name in params
        }

    given = {"b1": OPTIM.b1, "b2": OPTIM.b2, "eps": OPTIM.eps}
    theirs = optax.partition(
        {
            "lamb": optax.lamb(RATE, **given, weight_decay=OPTIM.weight_decay),
            "adamw": optax.adamw(RATE, **given, weight_decay=0.0),
        },
        labels,
    )
    params = layers(beginning())
    assert {name for name in params if labels({name: 0})[name] == "lamb"} > {
        "text/transformer/resblocks/mlp/c_fc/kernel/1", "text/token_embedding"
    }  # fmt: skip
    expected = followed(theirs, params, layers(gradients()))
    assert_close(expected, layers(optimized(OPTIM, make_mesh(MESHES["2x2x2"]))))
