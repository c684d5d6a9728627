"""The modified ResNet: BatchNorm's statistics, groups, remat, and what gradients reach."""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.clip import CLIP, CLIPConfig, join_batch_stats, split_batch_stats
from clip_jax.models.layers import Layout
from clip_jax.models.resnet import BatchNorm, ResNetConfig, Stage, conv
from clip_jax.models.text import TextConfig
from tests.conftest import TINY

VISION = ResNetConfig(image_size=32, layers=(1, 1, 1, 1), width=8, num_heads=4)
TEXT = TextConfig(context_length=8, vocab_size=32, width=16, depth=1, num_heads=2)
CONFIG = CLIPConfig(embed_dim=24, vision=VISION, text=TEXT, dtype="float32")


@pytest.fixture(scope="module")
def params():
    """Numbers of the size that training leaves: a last gain of zero would hide every branch."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = path[-1].key
        if name in ("scale", "var"):
            return jnp.asarray(rng.uniform(0.5, 1.5, x.shape), jnp.float32)
        fan_in = math.prod(x.shape[:-1]) if name == "kernel" else 25
        return jnp.asarray(rng.normal(0, fan_in**-0.5, x.shape), jnp.float32)

    shapes = jax.eval_shape(CLIP(CONFIG).init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(2), (16, 32, 32, 3))


def test_initial_gain_of_the_last_norm_is_zero():
    @jax.jit
    def draw(key):  # only what is looked at, so that it compiles quickly
        visual = CLIP(CONFIG).init(key)["visual"]
        gains = visual["layer2"]["0"]["bn3"]["scale"], visual["bn3"]["scale"]
        return *gains, visual["attnpool"]["q_proj"]["kernel"]

    last, first, query = draw(jax.random.key(0))
    assert not last.any()
    assert (first == 1).all()
    assert np.std(query) == pytest.approx(256**-0.5, rel=0.02)


@pytest.mark.parametrize(("known", "tolerance"), [(20.0, 2e-6), (0.0, 1e-4)])
def test_values_gradients_and_running_statistics_are_float64s(known, tolerance):
    """To rounding where the running mean is the batch's; where it isn't yet, ten deviations off.

    As in PyTorch momentum is 0.1, and the variance that runs is unbiased.
    """
    rng = np.random.default_rng(0)
    x, gradient = rng.normal(20, 2, (8, 7, 7, 5)), rng.normal(size=(8, 7, 7, 5))
    x[..., 4] = 20  # a dead channel has no variance
    stats = {"mean": jnp.full(5, known), "var": jnp.ones(5)}
    params = {"scale": jnp.full(5, 1.5), "bias": jnp.full(5, 0.5)}

    def normalised(params, x):
        variables = {"params": params, "batch_stats": stats}
        return BatchNorm(train=True).apply(variables, x, mutable=["batch_stats"])

    y, back, new = jax.vjp(normalised, params, jnp.asarray(x, jnp.float32), has_aux=True)
    of_params, of_x = back(jnp.asarray(gradient, jnp.float32))
    std = np.sqrt(x.var((0, 1, 2)) + 1e-5)
    normal = (x - x.mean((0, 1, 2))) / std
    share = gradient.mean((0, 1, 2)) + normal * (gradient * normal).mean((0, 1, 2))
    expected = {
        "y": (y, 1.5 * normal + 0.5),
        "scale": (of_params["scale"], (gradient * normal).sum((0, 1, 2))),
        "x": (of_x, 1.5 / std * (gradient - share)),
        "mean": (new["batch_stats"]["mean"], 0.9 * known + 0.1 * x.mean((0, 1, 2))),
        "var": (new["batch_stats"]["var"], 0.9 + 0.1 * x.reshape(-1, 5).var(0, ddof=1)),
    }
    for got, right in expected.values():
        np.testing.assert_allclose(
            got[..., :4], right[..., :4], atol=tolerance * np.abs(right[..., :4]).max()
        )
        assert np.isfinite(got).all()


def test_groups_are_independent_batches():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 2, 2, 5)) + np.repeat([0.0, 3.0], 3).reshape(6, 1, 1, 1)
    variables = {
        "params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)},
        "batch_stats": {"mean": jnp.zeros(5), "var": jnp.ones(5)},
    }
    norm = BatchNorm(train=True, group=3)
    y, new = norm.apply(variables, jnp.asarray(x, jnp.float32), mutable=["batch_stats"])
    groups = x.reshape(2, -1, 5)
    expected = (groups - groups.mean(1, keepdims=True)) / np.sqrt(
        groups.var(1, keepdims=True) + 1e-5
    )
    np.testing.assert_allclose(y.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5)
    mean, var = groups.mean((0, 1)), groups.var(1, ddof=1).mean(0)
    np.testing.assert_allclose(new["batch_stats"]["mean"], 0.1 * mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(new["batch_stats"]["var"], 0.9 + 0.1 * var, rtol=1e-4)


def test_a_batch_that_groups_do_not_divide_is_refused(params, images):
    grouped = CLIP(replace(CONFIG, vision=replace(VISION, batch_norm_group=3)))
    with pytest.raises(ValueError, match=r"groups of 3.*batch_norm_group"):
        grouped.encode_image_train(params, images)


def test_evaluation_uses_what_training_stored(params, images):
    model = CLIP(CONFIG)
    trainable, stats = split_batch_stats(params)
    train, evaluate = jax.jit(model.encode_image_train), jax.jit(model.encode_image)
    before = evaluate(params, images)
    for _ in range(60):
        features, stats = train(join_batch_stats(trainable, stats), images)
    after = evaluate(join_batch_stats(trainable, stats), images)
    # Running variances are unbiased: over few values (16) they stay apart from the batch's.
    assert np.linalg.norm(after - features) < 0.2 * np.linalg.norm(features)
    assert np.linalg.norm(before - features) > 0.5 * np.linalg.norm(features)


def test_remat_changes_no_number():
    """Of one stage, each of which has its own."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 6)), jnp.float32)
    norm = functools.partial(BatchNorm, train=True)

    def stage(remat):
        return Stage(2, 2, 2, norm, conv, remat, Layout())

    shapes = jax.eval_shape(stage("none").init, jax.random.key(0), x)
    variables = jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape)), shapes)

    def lowered(remat):
        def loss(params, stats):
            y, new = stage(remat).apply(
                {"params": params, "batch_stats": stats}, x, mutable=["batch_stats"]
            )
            return jnp.square(y).sum(), new

        return jax.jit(jax.grad(loss, has_aux=True)).lower(*inputs)

    inputs = variables["params"], variables["batch_stats"]
    programs = {remat: lowered(remat) for remat in ("none", "hidden", "full")}
    convolutions = {x: y.as_text().count("stablehlo.convolution") for x, y in programs.items()}
    assert convolutions["none"] == convolutions["hidden"] < convolutions["full"]
    a, b = (jax.tree.leaves(programs[remat].compile()(*inputs)) for remat in ("none", "full"))
    for x, y in zip(a, b, strict=True):
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x)
        assert np.abs(x).max() > 0


def test_a_vit_has_no_statistics():
    model = CLIP(TINY)
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert split_batch_stats(params) == (params, {})
    images = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
    _, stats = jax.eval_shape(model.encode_image_train, params, images)
    assert stats == {}


def test_image_size_must_be_a_multiple_of_the_stride():
    with pytest.raises(ValueError, match=r"vision.image_size=100.*multiple of 32"):
        ResNetConfig(image_size=100)
