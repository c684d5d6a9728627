"""LAMB on a mesh beside optax's, layer by layer."""

import optax

from clip_jax.optim import LAMB, OptimConfig
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
