"""Schedule and decay mask."""

import jax
import numpy as np
import optax
import pytest

from clip_jax.models import zoo
from clip_jax.models.clip import CLIP
from clip_jax.optim import OptimConfig, averaged, decay_mask, make_optimizer, schedule
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


def two_towers():
    return {
        "visual": {"kernel": np.full(3, 2.0, np.float32)},
        "text": {"kernel": np.full(3, 2.0, np.float32)},
        "logit_scale": np.float32(1),
    }


def one_update(config, params, grads):
    optimizer = make_optimizer(config, 10)
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    return optax.apply_updates(params, updates), state


PLAIN = {"learning_rate": 0.1, "warmup_steps": 0, "weight_decay": 0.0}


def test_towers_have_their_own_rates():
    params = two_towers()
    config = OptimConfig(**PLAIN, image_rate=0.5, text_rate=0.25)
    after, _ = one_update(config, params, jax.tree.map(np.ones_like, params))
    moved = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b))), params, after)
    assert moved["visual"]["kernel"] == pytest.approx(0.05, rel=1e-4)
    assert moved["text"]["kernel"] == pytest.approx(0.025, rel=1e-4)
    assert moved["logit_scale"] == pytest.approx(0.1, rel=1e-4)


def test_a_locked_tower_keeps_its_weights_and_takes_no_memory():
    params = two_towers()
    config = OptimConfig(**PLAIN | {"weight_decay": 0.5}, locked=("image",))
    after, state = one_update(config, params, jax.tree.map(np.ones_like, params))
    np.testing.assert_array_equal(after["visual"]["kernel"], params["visual"]["kernel"])
    assert not np.array_equal(after["text"]["kernel"], params["text"]["kernel"])
    arrays = jax.tree.leaves(state)
    assert sum(x.size for x in arrays if x.ndim) == 2 * 3  # the text tower's two moments
    with pytest.raises(ValueError, match="holds both towers"):
        OptimConfig(locked=("image", "text"))


def test_the_average_follows_the_weights():
    params = two_towers()
    after, state = one_update(
        OptimConfig(**PLAIN, ema_decay=0.75), params, jax.tree.map(np.ones_like, params)
    )
    ema = averaged(state, params)
    expected = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, params, after)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ema, expected)
    assert averaged(make_optimizer(OptimConfig(), 10_000).init(params), params) is params


@pytest.mark.parametrize("bad", [np.nan, np.inf, 100.0])
def test_an_update_that_is_not_finite_or_unusual_is_skipped_and_counted(bad):
    params = two_towers()
    optimizer = make_optimizer(OptimConfig(**PLAIN, skip_norm_ratio=10.0, ema_decay=0.9), 1_000)
    state = optimizer.init(params)
    ones = jax.tree.map(np.ones_like, params)
    update = jax.jit(optimizer.update)
    _, early = update(jax.tree.map(lambda x: 100.0 * x, ones), state, params)
    assert int(early.skipped) == 0  # nothing is unusual yet
    for _ in range(100):
        _, state = update(ones, state, params)
    updates, after = update(jax.tree.map(lambda x: bad * x, ones), state, params)
    assert all((x == 0).all() for x in jax.tree.leaves(updates))
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, after.inner, state.inner)
    updates, after = update(jax.tree.map(lambda x: 9 * x, ones), after, params)
    assert all((x != 0).all() for x in jax.tree.leaves(updates))
    assert (int(after.skipped), int(after.skipped_in_a_row)) == (1, 0)
