"""Schedule and decay mask."""

import jax
import numpy as np
import optax
import pytest

from clip_jax.models import zoo
from clip_jax.models.clip import CLIP
from clip_jax.optim import OptimConfig, decay_mask, make_optimizer, schedule
from clip_jax.sharding import path_name


def test_warm_up_is_linear_and_the_cosine_ends_at_the_final_rate():
    rate = schedule(OptimConfig(learning_rate=1.0, warmup_steps=10, final_learning_rate=0.1), 110)
    np.testing.assert_allclose([rate(0), rate(4), rate(9)], [0.1, 0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rate(10), rate(60), rate(110)], [1.0, 0.55, 0.1], rtol=1e-6)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"optim\.warmup_steps=10 leaves nothing of steps=10"):
        schedule(OptimConfig(warmup_steps=10), 10)


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B-16-SigLIP", "ViT-M-16-alt", "RN50"])
def test_matrices_decay_and_gains_and_biases_do_not(name):
    params = jax.eval_shape(CLIP(zoo.get(name)).init, jax.random.key(0))
    params.pop("batch_stats", None)
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(params)):
        last = path_name(path).split("/")[-1]
        weight = last in (
            "kernel", "proj", "text_projection", "token_embedding", "positional_embedding", "latent"
        )  # fmt: skip
        assert decays == weight, path_name(path)


def test_decay_is_decoupled_and_clipping_bounds_the_gradient():
    params = {"kernel": np.full(3, 2.0, np.float32), "bias": np.full(3, 2.0, np.float32)}
    zero = jax.tree.map(np.zeros_like, params)
    optim = OptimConfig(learning_rate=0.1, weight_decay=0.5, warmup_steps=0)
    optimizer = make_optimizer(optim, 10)
    updates, _ = optimizer.update(zero, optimizer.init(params), params)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)

    clipped = make_optimizer(OptimConfig(clip_norm=1.0, eps=1.0, warmup_steps=0), 10)
    large = jax.tree.map(lambda x: 1e6 * np.ones_like(x), params)
    _, state = clipped.update(large, clipped.init(params), params)
    moments = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moments)) == pytest.approx(0.1, rel=1e-5)


def test_the_first_moment_can_be_stored_in_bfloat16():
    params = {"kernel": np.ones(3, np.float32)}
    state = make_optimizer(OptimConfig(first_moment="bfloat16"), 10_000).init(params)
    assert optax.tree.get(state, "mu")["kernel"].dtype == "bfloat16"
    assert optax.tree.get(state, "nu")["kernel"].dtype == "float32"
