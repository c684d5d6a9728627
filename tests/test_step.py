"""One step: the same on every mesh, the same as ever (golden), and learning something."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import DictKey

from clip_jax import sharding
from clip_jax.losses import SigmoidConfig, SoftmaxConfig
from clip_jax.models.clip import CLIP, split_batch_stats
from clip_jax.models.resnet import ResNetConfig
from clip_jax.optim import OptimConfig, make_optimizer
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import State, compute_loss, init_state, jit_step, state_shardings
from tests.models.test_clip import TINY

GOLDEN = Path(__file__).parent / "golden/step.json"
# Adam divides by |gradient| + ε: with the paper's ε of 1e-6 it would show rounding, not the mesh.
OPTIM = OptimConfig(learning_rate=1e-3, warmup_steps=0, eps=1e-3)
RESNET = dataclasses.replace(
    TINY, vision=ResNetConfig(image_size=64, layers=(1, 1, 1, 1), width=8, num_heads=4)
)
SIGLIP = dataclasses.replace(TINY, init_logit_bias=-10.0)
MESHES = {
    "8": MeshConfig(),
    "4x2": MeshConfig(data=4, fsdp=2),
    "2x2x2": MeshConfig(data=2, fsdp=2, tensor=2),
}


def batch(config, size=16):
    rng = np.random.default_rng(0)
    pixels = config.vision.image_size
    tokens = rng.integers(1, 517, (size, config.text.context_length), np.int32)
    tokens[:, -2] = 519  # end of text
    tokens[3] = tokens[7]  # a caption that stands twice
    return {"image": rng.integers(0, 256, (size, pixels, pixels, 3), np.uint8), "text": tokens}


def parameters(config):
    """Parameters from NumPy: the same on every version of jax."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0))

    def draw(path, x):
        if path[-1].key in ("scale", "var"):
            return np.ones(x.shape, np.float32)
        if path[-1].key == "logit_scale":
            return np.float32(np.log(10))
        if path[-1].key == "logit_bias":  # near zero, negatives and positives cancel to rounding
            return np.float32(-3)
        scale = np.prod(x.shape[:-1]) ** -0.5 if path[-1].key == "kernel" else 0.2
        if path[-2:] == (DictKey("out_proj"), DictKey("kernel")):
            scale *= 4  # or all captions look alike, and their gradients cancel to rounding
        return (scale * rng.standard_normal(x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def gradients_on(config, loss, mesh):
    """Loss and gradients, on the host."""
    model = CLIP(config)
    params = parameters(config)
    params = jax.device_put(params, sharding.param_shardings(config, params, mesh))
    data = jax.device_put(batch(config), sharding.batch_sharding(mesh))
    objective = functools.partial(compute_loss, model=model, loss=loss, mesh=mesh)
    objective = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (value, _), grads = objective(*split_batch_stats(params), data)
    return jax.device_get((value, grads))


def step_on(config, loss, mesh):
    """Parameters after one step and its metrics, on the host."""
    model, optimizer = CLIP(config), make_optimizer(OPTIM, 10)
    shardings = state_shardings(model, optimizer, mesh)
    params = parameters(config)
    trainable, _ = split_batch_stats(params)
    state = State(jnp.zeros((), jnp.int32), params, optimizer.init(trainable))
    state = jax.device_put(state, shardings)
    data = jax.device_put(batch(config), sharding.batch_sharding(mesh))
    after, metrics = jit_step(model, OPTIM, 10, loss, mesh, shardings)(state, data)
    return jax.device_get((after.params, metrics))


@functools.cache
def reference(function, config, loss):
    return function(config, loss, make_mesh(MeshConfig(), jax.devices()[:1]))


def assert_close(expected, got, key_bias=1e-6):
    """Per tensor, the largest difference is at most 1e-5 of the reference's largest value.

    The exact gradient of an attention's key bias is zero, so it is compared absolutely.
    """
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got), strict=True
    ):
        name = sharding.path_name(path)
        if name.endswith("attn/in_proj/bias"):
            np.testing.assert_allclose(b[:, 1], a[:, 1], rtol=0, atol=key_bias, err_msg=name)
            a, b = a[:, ::2], b[:, ::2]
        if name.endswith("k_proj/bias"):
            np.testing.assert_allclose(b, a, rtol=0, atol=key_bias, err_msg=name)
            continue
        assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max(), name


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("config", "loss"),
    [
        (TINY, SoftmaxConfig(mask_same_caption=True)),
        (SIGLIP, SigmoidConfig()),
    ],
    ids=["vit", "siglip"],
)
def test_every_mesh_gives_the_same_loss_and_gradients(config, loss, mesh):
    value, grads = reference(gradients_on, config, loss)
    got_value, got_grads = gradients_on(config, loss, make_mesh(MESHES[mesh]))
    np.testing.assert_allclose(got_value, value, rtol=1e-5)
    assert_close(grads, got_grads)


@pytest.mark.parametrize("mesh", ["2x2x2"])
def test_a_resnet_is_the_same_on_a_mesh_up_to_batch_norms_rounding(mesh):
    """BatchNorm's gradient is a difference of large sums: it costs one digit of float32."""
    value, grads = reference(gradients_on, RESNET, SoftmaxConfig())
    got_value, got_grads = gradients_on(RESNET, SoftmaxConfig(), make_mesh(MESHES[mesh]))
    np.testing.assert_allclose(got_value, value, rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(got_grads), strict=True
    ):
        name = sharding.path_name(path)
        if not name.endswith(("k_proj/bias", "attn/in_proj/bias")):  # their gradient is zero
            assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a), name


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_takes_the_same_step(mesh):
    loss = SoftmaxConfig(mask_same_caption=True)
    params, metrics = reference(step_on, TINY, loss)
    got_params, got_metrics = step_on(TINY, loss, make_mesh(MESHES[mesh]))
    # Adam scales whatever is not zero, rounding too, up to at most one learning rate.
    assert_close(params, got_params, key_bias=OPTIM.learning_rate)
    assert_close(metrics, got_metrics)


def test_the_golden_step():
    """The numbers of one step, held to what they were. Regenerate only with a reason."""
    expected, got = json.loads(GOLDEN.read_text()), golden()
    assert got["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert got["parameters"] == pytest.approx(expected["parameters"], rel=1e-5)


def golden():
    """Scalar metrics, and the sum of every parameter's absolute values after one step."""
    params, metrics = reference(step_on, TINY, SoftmaxConfig(mask_same_caption=True))
    sums = {
        sharding.path_name(path): float(np.abs(x).sum(dtype=np.float64))
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }
    return {"metrics": {name: float(x) for name, x in metrics.items()}, "parameters": sums}


def test_a_batch_is_learned_by_heart():
    """Sixty steps on one batch bring the loss from chance to nearly nothing."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    model, optim = CLIP(TINY), OptimConfig(learning_rate=3e-3, warmup_steps=5, clip_norm=1.0)
    optimizer = make_optimizer(optim, 60)
    shardings = state_shardings(model, optimizer, mesh)
    init = functools.partial(init_state, model=model, optimizer=optimizer)
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    loss = SoftmaxConfig(mask_same_caption=True)
    step = jit_step(model, optim, 60, loss, mesh, shardings)
    data = jax.device_put(batch(TINY), sharding.batch_sharding(mesh))
    losses = []
    for _ in range(60):
        state, metrics = step(state, data)
        losses.append(float(metrics["loss"]))
    assert losses[0] > 2
    assert losses[-1] < 0.2
    assert int(state.step) == 60


def test_the_logit_scale_is_capped():
    config = dataclasses.replace(TINY, init_logit_scale=99.99)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optim = OptimConfig(learning_rate=1.0, warmup_steps=0, max_logit_scale=100.0)
    model, optimizer = CLIP(config), make_optimizer(optim, 10)
    shardings = state_shardings(model, optimizer, mesh)
    init = functools.partial(init_state, model=model, optimizer=optimizer)
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    step = jit_step(model, optim, 10, SoftmaxConfig(), mesh, shardings)
    state, metrics = step(state, jax.device_put(batch(config), sharding.batch_sharding(mesh)))
    assert float(metrics["logit_scale"]) <= 100.001
