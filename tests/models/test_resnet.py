"""The modified ResNet: BatchNorm's statistics, groups, remat, and what gradients reach."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models.clip import CLIP, join_batch_stats, split_batch_stats
from clip_jax.models.layers import Layout
from clip_jax.models.resnet import BatchNorm, ResNetConfig, Stage, conv
from tests.conftest import RESNET, parameters

CONFIG = replace(RESNET, vision=replace(RESNET.vision, image_size=32))


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


@pytest.mark.parametrize(
    ("known", "group", "tolerance"), [(20.0, None, 2e-6), (20.0, 4, 2e-6), (0.0, None, 1e-4)]
)
def test_values_gradients_and_running_statistics_are_float64s(known, group, tolerance):
    """To rounding where the running mean is the batch's; where it isn't yet, ten deviations off.

    As in PyTorch momentum is 0.1, and the variance that runs is unbiased. Groups are independent
    batches, whose statistics run on average.
    """
    rng = np.random.default_rng(0)
    x, gradient = rng.normal(20, 2, (8, 7, 7, 5)), rng.normal(size=(8, 7, 7, 5))
    x[4:] += 1
    x[..., 4] = 20  # a dead channel has no variance
    stats = {"mean": jnp.full(5, known), "var": jnp.ones(5)}
    params = {"scale": jnp.full(5, 1.5), "bias": jnp.full(5, 0.5)}

    def normalised(params, x):
        variables = {"params": params, "batch_stats": stats}
        return BatchNorm(train=True, group=group).apply(variables, x, mutable=["batch_stats"])

    @jax.jit
    def compute(params, x, gradient):
        y, back, new = jax.vjp(normalised, params, x, has_aux=True)
        return y, new, back(gradient)

    y, new, (of_params, of_x) = compute(params, np.float32(x), np.float32(gradient))
    x, gradient = (a.reshape(8 // (group or 8), -1, 5) for a in (x, gradient))
    std = np.sqrt(x.var(1, keepdims=True) + 1e-5)
    normal = (x - x.mean(1, keepdims=True)) / std
    share = gradient.mean(1, keepdims=True) + normal * (gradient * normal).mean(1, keepdims=True)
    expected = {
        "y": (y, 1.5 * normal + 0.5),
        "scale": (of_params["scale"], (gradient * normal).sum((0, 1))),
        "x": (of_x, 1.5 / std * (gradient - share)),
        "mean": (new["batch_stats"]["mean"], 0.9 * known + 0.1 * x.mean((0, 1))),
        "var": (new["batch_stats"]["var"], 0.9 + 0.1 * x.var(1, ddof=1).mean(0)),
    }
    for got, right in expected.values():
        got, most = np.reshape(got, right.shape), np.abs(right[..., :4]).max()
        np.testing.assert_allclose(got[..., :4], right[..., :4], atol=tolerance * most)
        assert np.isfinite(got).all()


def test_what_does_not_divide_is_refused():
    norm = BatchNorm(train=True, group=3)
    with pytest.raises(ValueError, match=r"groups of 3.*batch_norm_group"):
        norm.init(jax.random.key(0), jnp.zeros((8, 2, 2, 5)))
    with pytest.raises(ValueError, match=r"vision.image_size=100.*multiple of 32"):
        ResNetConfig(image_size=100)


def test_evaluation_uses_what_training_stored():
    model, params = CLIP(CONFIG), parameters(CONFIG)
    images = jax.random.normal(jax.random.key(2), (16, 32, 32, 3))
    trainable, stats = split_batch_stats(params)
    texts = {"text": jnp.zeros((16, CONFIG.text.context_length), jnp.int32)}
    evaluate = jax.jit(model.encode_image)
    train = jax.jit(lambda params: model.outputs(params, {"image": images}, texts, train=True))
    before = evaluate(params, images)
    for _ in range(60):
        out, stats = train(join_batch_stats(trainable, stats))
    features = out["image"]
    after = evaluate(join_batch_stats(trainable, stats), images)
    # Running variances are unbiased: over few values (16) they stay apart from the batch's.
    assert np.linalg.norm(after - features) < 0.2 * np.linalg.norm(features)
    assert np.linalg.norm(before - features) > 0.5 * np.linalg.norm(features)


def test_remat_computes_more_again_and_changes_no_number():
    """Of one stage, each of which has its own."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 8, 8, 6)), jnp.float32)

    def stage(remat):
        return Stage(2, 2, 2, functools.partial(BatchNorm, train=True), conv, remat, Layout())

    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape)),
        jax.eval_shape(stage("none").init, jax.random.key(0), x),
    )

    def lowered(remat):
        def loss(variables):
            y, new = stage(remat).apply(variables, x, mutable=["batch_stats"])
            return jnp.square(y).sum(), new

        return jax.jit(jax.grad(loss, has_aux=True)).lower(variables)

    programs = {remat: lowered(remat) for remat in ("none", "hidden", "full")}
    convolutions = {x: y.as_text().count("stablehlo.convolution") for x, y in programs.items()}
    assert convolutions["none"] == convolutions["hidden"] < convolutions["full"]
    (a, stats), (b, again) = (programs[remat].compile()(variables) for remat in ("none", "full"))
    plain, recomputed = (jax.tree.leaves(x) for x in ((a["params"], stats), (b["params"], again)))
    for x, y in zip(plain, recomputed, strict=True):
        assert np.linalg.norm(x - y) <= 1e-4 * np.linalg.norm(x)
        assert np.abs(x).max() > 0
