"""Schedules, the decay mask, and what is put around an optimizer."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from clip_jax.models import zoo
from clip_jax.models.dimensions import table
from clip_jax.optim import (
    CoolDown,
    InverseSqrt,
    OptimConfig,
    averaged,
    decay_mask,
    make_optimizer,
    schedule,
)
from clip_jax.optim.wrappers import scale_layers
from clip_jax.refused import Refused
from clip_jax.sharding import path_name
from tests.optim.conftest import names_only


def test_warm_up_is_linear_and_the_cosine_ends_at_the_final_rate():
    rate = schedule(OptimConfig(learning_rate=1.0, warmup_steps=10, final_learning_rate=0.1), 110)
    np.testing.assert_allclose([rate(0), rate(4), rate(9)], [0.1, 0.5, 1.0], rtol=1e-6)
    np.testing.assert_allclose([rate(10), rate(60), rate(110)], [1.0, 0.55, 0.1], rtol=1e-6)


def test_schedules_at_their_borders():
    config = OptimConfig(learning_rate=1.0, warmup_steps=10, final_learning_rate=0.1)
    sqrt = schedule(dataclasses.replace(config, schedule=CoolDown(steps=40, shape="sqrt")), 100)
    assert (sqrt(59), sqrt(60), sqrt(70), sqrt(100)) == pytest.approx((1, 1, 0.55, 0.1))
    linear = schedule(dataclasses.replace(config, schedule=CoolDown(steps=40)), 100)
    assert (linear(60), linear(80), linear(100)) == pytest.approx((1, 0.55, 0.1))
    inverse = schedule(dataclasses.replace(config, schedule=InverseSqrt(timescale=30)), 10**6)
    assert (inverse(9), inverse(10), inverse(100)) == pytest.approx((1, 1, 0.5))
    with pytest.raises(Refused, match=r"optim\.schedule\.steps=95 of cool-down after"):
        schedule(dataclasses.replace(config, schedule=CoolDown(steps=95)), 100)


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"optim\.warmup_steps=10 leaves nothing of steps=10"):
        schedule(OptimConfig(warmup_steps=10), 10)


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B-16-SigLIP", "ViT-M-16-alt", "RN50"])
def test_matrices_decay_and_gains_and_biases_do_not(name):
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(names_only(zoo.get(name)))):
        last = path_name(path).split("/")[-1]
        weight = last in (
            "kernel", "proj", "text_projection", "token_embedding", "positional_embedding", "latent"
        )  # fmt: skip
        assert decays == weight, path_name(path)


def test_decay_is_decoupled_and_clipping_bounds_the_gradient():
    params = {"kernel": np.full(3, 2.0, np.float32), "bias": np.full(3, 2.0, np.float32)}
    zero = jax.tree.map(np.zeros_like, params)
    optim = OptimConfig(learning_rate=0.1, weight_decay=0.5, warmup_steps=0)
    optimizer = make_optimizer(optim, {})
    updates, _ = optimizer.update(zero, optimizer.init(params), params, rate=0.1)
    np.testing.assert_allclose(np.asarray(updates["kernel"]), -0.1 * 0.5 * 2.0, rtol=1e-6)
    np.testing.assert_array_equal(updates["bias"], 0)

    clipped = make_optimizer(OptimConfig(clip_norm=1.0, eps=1.0), {})
    large = jax.tree.map(lambda x: 1e6 * np.ones_like(x), params)
    _, state = clipped.update(large, clipped.init(params), params, rate=1.0)
    moments = optax.tree.get(state, "mu")
    assert float(optax.tree.norm(moments)) == pytest.approx(0.1, rel=1e-5)


def test_the_first_moment_can_be_stored_in_bfloat16():
    params = {"kernel": np.ones(3, np.float32)}
    state = make_optimizer(OptimConfig(first_moment="bfloat16"), {}).init(params)
    assert optax.tree.get(state, "mu")["kernel"].dtype == "bfloat16"
    assert optax.tree.get(state, "nu")["kernel"].dtype == "float32"


def two_towers():
    return {
        "visual": {"kernel": np.full(3, 2.0, np.float32)},
        "text": {"kernel": np.full(3, 2.0, np.float32)},
        "logit_scale": np.float32(1),
    }


def one_update(config, params, grads):
    optimizer = make_optimizer(config, {})
    updates, state = optimizer.update(
        grads, optimizer.init(params), params, rate=config.learning_rate
    )
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


@pytest.mark.parametrize("name", ["ViT-B/32", "RN50"])
def test_layers_have_rates_that_rise_towards_the_end(name):
    """Twelve layers below one another; of RN50, sixteen blocks."""
    config = zoo.get(name)
    rows, thin = table(config), names_only(config)
    thin = jax.tree_util.tree_map_with_path(
        lambda path, x: x.repeat(12, 0) if rows[path_name(path)].startswith("depth") else x, thin
    )
    scaled, _ = scale_layers(0.5, rows).update(thin, optax.EmptyState())
    assert jax.tree.map(np.shape, scaled) == jax.tree.map(np.shape, thin)
    rates = {
        path_name(path): np.ravel(x) if np.ndim(x) else float(x)
        for path, x in jax.tree_util.tree_leaves_with_path(scaled)
    }
    assert rates["logit_scale"] == 1
    assert rates["text/ln_final/scale"][0] == rates["text/text_projection"][0] == 1
    assert rates["text/token_embedding"][0] == rates["text/positional_embedding"][0] == 0.5**13
    np.testing.assert_allclose(
        rates["text/transformer/resblocks/mlp/c_fc/bias"], 0.5 ** np.arange(12, 0, -1)
    )
    if name == "RN50":
        assert rates["visual/bn1/scale"][0] == 0.5**17
        assert rates["visual/layer1/0/downsample/0/kernel"][0] == 0.5**16
        assert rates["visual/layer4/2/bn3/bias"][0] == 0.5
        assert rates["visual/attnpool/c_proj/kernel"][0] == 1
    else:
        assert rates["visual/class_embedding"][0] == rates["visual/ln_pre/bias"][0] == 0.5**13
        assert rates["visual/proj"][0] == rates["visual/ln_post/scale"][0] == 1


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
    assert averaged(make_optimizer(OptimConfig(), {}).init(params), params) is params


@pytest.mark.parametrize("bad", [np.nan, np.inf, 100.0])
def test_an_update_that_is_not_finite_or_unusual_is_skipped_and_counted(bad):
    params = two_towers()
    optimizer = make_optimizer(OptimConfig(**PLAIN, skip_norm_ratio=10.0, ema_decay=0.9), {})
    state = optimizer.init(params)
    ones = jax.tree.map(np.ones_like, params)
    update = jax.jit(functools.partial(optimizer.update, rate=0.1))
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
