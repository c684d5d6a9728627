"""The modified ResNet: BatchNorm's statistics, groups, remat, and what gradients reach."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, CLIPConfig, count, join_batch_stats, split_batch_stats
from clip_jax.models.resnet import BatchNorm, ResNetConfig
from clip_jax.models.text import TextConfig

VISION = ResNetConfig(image_size=32, layers=(1, 2, 1, 1), width=8, num_heads=4)
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


@pytest.mark.parametrize(
    ("name", "millions", "image_millions"),
    [
        ("RN50", 102.01, 38.32),
        ("RN101", 119.69, 56.26),
        ("RN50x4", 178.30, 87.14),
        ("RN50x16", 290.98, 167.33),
        ("RN50x64", 623.26, 420.38),
    ],
)
def test_parameter_counts_are_the_papers(name, millions, image_millions):
    params = jax.eval_shape(CLIP(zoo.get(name)).init, jax.random.key(0))
    assert count(params) / 1e6 == pytest.approx(millions, abs=0.005)
    assert count(params["visual"]) / 1e6 == pytest.approx(image_millions, abs=0.005)


def test_initial_gain_of_the_last_norm_is_zero():
    @jax.jit
    def draw(key):  # only what is looked at, so that it compiles quickly
        visual = CLIP(CONFIG).init(key)["visual"]
        gains = visual["layer2"]["1"]["bn3"]["scale"], visual["bn3"]["scale"]
        return *gains, visual["attnpool"]["q_proj"]["kernel"]

    last, first, query = draw(jax.random.key(0))
    assert not last.any()
    assert (first == 1).all()
    assert np.std(query) == pytest.approx(256**-0.5, rel=0.02)


def test_running_statistics_are_torchs():
    """Momentum 0.1, biased variance to normalise, unbiased variance to run."""
    x = np.random.default_rng(0).normal(3, 2, (2, 3, 3, 5)).astype(np.float32)
    norm = BatchNorm(train=True)
    variables = norm.init(jax.random.key(0), jnp.asarray(x))
    variables["batch_stats"] = {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    y, updates = norm.apply(variables, jnp.asarray(x), mutable=["batch_stats"])
    flat = x.reshape(-1, 5)
    np.testing.assert_allclose(updates["batch_stats"]["mean"], 0.1 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(
        updates["batch_stats"]["var"], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5
    )
    np.testing.assert_allclose(
        y, (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("known", "tolerance"), [(20.0, 2e-6), (0.0, 1e-4)])
def test_values_and_gradients_far_from_zero_are_float64s(known, tolerance):
    """To rounding where the running mean is the batch's; where it isn't yet, ten deviations off."""
    rng = np.random.default_rng(0)
    x, gradient = rng.normal(20, 2, (8, 7, 7, 5)), rng.normal(size=(8, 7, 7, 5))
    x[..., 4] = 20  # a dead channel has no variance
    stats = {"mean": jnp.full(5, known), "var": jnp.ones(5)}
    params = {"scale": jnp.full(5, 1.5), "bias": jnp.full(5, 0.5)}

    def normalised(params, x):
        variables = {"params": params, "batch_stats": stats}
        return BatchNorm(train=True).apply(variables, x, mutable=["batch_stats"])[0]

    y, back = jax.vjp(normalised, params, jnp.asarray(x, jnp.float32))
    of_params, of_x = back(jnp.asarray(gradient, jnp.float32))
    std = np.sqrt(x.var((0, 1, 2)) + 1e-5)
    normal = (x - x.mean((0, 1, 2))) / std
    share = gradient.mean((0, 1, 2)) + normal * (gradient * normal).mean((0, 1, 2))
    expected = {
        "y": (y, 1.5 * normal + 0.5),
        "scale": (of_params["scale"], (gradient * normal).sum((0, 1, 2))),
        "x": (of_x, 1.5 / std * (gradient - share)),
    }
    for found, right in expected.values():
        np.testing.assert_allclose(
            found[..., :4], right[..., :4], atol=tolerance * np.abs(right[..., :4]).max()
        )
        assert np.isfinite(found).all()


@pytest.mark.long
def test_groups_are_independent_batches(params, images):
    grouped = CLIP(replace(CONFIG, vision=replace(VISION, batch_norm_group=8)))
    features, stats = jax.jit(grouped.encode_image_train)(params, images)
    train = jax.jit(CLIP(CONFIG).encode_image_train)
    halves = [train(params, images[i : i + 8]) for i in (0, 8)]
    np.testing.assert_allclose(
        features, np.concatenate([f for f, _ in halves]), rtol=1e-4, atol=1e-5
    )
    mean = jax.tree.map(lambda a, b: (a + b) / 2, halves[0][1], halves[1][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), stats, mean)
    whole, _ = train(params, images)
    assert np.abs(whole - features).max() > 1e-3


def test_a_batch_that_groups_do_not_divide_is_refused(params, images):
    grouped = CLIP(replace(CONFIG, vision=replace(VISION, batch_norm_group=3)))
    with pytest.raises(ValueError, match=r"groups of 3.*batch_norm_group"):
        grouped.encode_image_train(params, images)


def test_evaluation_uses_what_training_stored(params, images):
    model = CLIP(CONFIG)
    trainable, stats = split_batch_stats(params)
    train, evaluate = jax.jit(model.encode_image_train), jax.jit(model.encode_image)
    before = evaluate(params, images)
    for _ in range(100):
        features, stats = train(join_batch_stats(trainable, stats), images)
    after = evaluate(join_batch_stats(trainable, stats), images)
    # Running variances are unbiased: over few values (16) they stay apart from the batch's.
    assert np.linalg.norm(after - features) < 0.2 * np.linalg.norm(features)
    assert np.linalg.norm(before - features) > 0.5 * np.linalg.norm(features)


@pytest.mark.long
@pytest.mark.parametrize("remat", ["hidden", pytest.param("full", marks=pytest.mark.slow)])
def test_remat_changes_no_number(params, images, remat):
    trainable, stats = split_batch_stats(params)

    def gradients(config):
        def loss(trainable):
            features, new = CLIP(config).encode_image_train(
                join_batch_stats(trainable, stats), images
            )
            return jnp.square(features).sum(), new

        return jax.jit(jax.grad(loss, has_aux=True))(trainable)

    a, b = gradients(CONFIG), gradients(replace(CONFIG, remat=remat))

    def close(path, x, y):
        # The key bias has no gradient but rounding. One ReLU that flips would show as 1e-2.
        floor = 1e-3 if "k_proj" in jax.tree_util.keystr(path) else 0
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x) + floor, path

    jax.tree_util.tree_map_with_path(close, a, b)
    assert np.abs(a[0]["visual"]["layer1"]["0"]["downsample"]["0"]["kernel"]).max() > 0


def test_a_vit_has_no_statistics():
    model = CLIP(replace(zoo.get("ViT-B/32"), dtype="float32"))
    params = jax.eval_shape(model.init, jax.random.key(0))
    assert split_batch_stats(params) == (params, {})
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    _, stats = jax.eval_shape(model.encode_image_train, params, images)
    assert stats == {}


def test_image_size_must_be_a_multiple_of_the_stride():
    with pytest.raises(ValueError, match=r"vision.image_size=100.*multiple of 32"):
        ResNetConfig(image_size=100)
