"""All forms of the losses, on all meshes, against a textbook version in float64."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import SigmoidConfig, SoftmaxConfig, contrastive_loss

AXES = ("data", "fsdp")
BATCH, WIDTH, EMBED = 48, 24, 16
CAPTIONS = np.arange(BATCH) % 40  # eight captions occur twice
MESHES = {"1": (1, 1, 1), "8": (8, 1, 1), "4x2": (4, 2, 1), "2x2x2": (2, 2, 2)}
LOSSES = {"softmax": SoftmaxConfig, "sigmoid": SigmoidConfig}
OPTIONS = {"plain": {}, "options": {"mask_same_caption": True, "label_smoothing": 0.1}}
BLOCK = 5  # divides neither the batch nor any device's rows: 48, 12 or 6


def make_mesh(name: str) -> Mesh:
    shape = MESHES[name]
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


def problem(*, noise: float = 0.5, scale: float = 100.0, bias: float = -70.0) -> tuple[dict, dict]:
    """Parameters and inputs of two linear towers whose pairs differ by `noise`."""
    draw = np.random.default_rng(0).normal
    image = draw(size=(BATCH, WIDTH))
    image = image[CAPTIONS] + 0.2 * noise * draw(size=(BATCH, WIDTH))  # one caption, alike
    inputs = {"image": image, "text": image + noise * draw(size=(BATCH, WIDTH))}
    tower = draw(size=(WIDTH, EMBED))
    params = {
        "image": tower,
        "text": tower + 0.1 * noise * draw(size=(WIDTH, EMBED)),
        "image_offset": np.zeros((BATCH, EMBED)),  # its gradient is that of the features
        "text_offset": np.zeros((BATCH, EMBED)),
        "logit_scale": np.log(scale),
        "logit_bias": np.array(bias),
    }
    return jax.tree.map(lambda a: np.asarray(a, np.float32), (params, inputs))


def features(params: dict, inputs: dict) -> list:
    found = []
    for side in ("image", "text"):
        x = inputs[side] @ params[side]
        found.append(x / jnp.linalg.norm(x, axis=1, keepdims=True) + params[f"{side}_offset"])
    return found


def textbook(params: dict, inputs: dict, config: Any) -> Any:
    """The definition of both losses, with the whole matrix and one-hot targets."""
    image, text = features(params, inputs)
    logits = jnp.exp(params["logit_scale"]) * image @ text.T
    own = np.eye(BATCH, dtype=bool)
    keep = own | (CAPTIONS[:, None] != CAPTIONS) | (not config.mask_same_caption)
    smooth = config.label_smoothing
    if isinstance(config, SigmoidConfig):
        logits = logits + params["logit_bias"]
        target = (1 - smooth) * own + smooth / 2
        log_yes, log_no = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
        return -jnp.where(keep, target * log_yes + (1 - target) * log_no, 0).sum() / BATCH
    total = 0.0
    for axis in (0, 1):
        target = (1 - smooth) * own + smooth * keep / keep.sum(axis, keepdims=True)
        log_p = jax.nn.log_softmax(jnp.where(keep, logits, -jnp.inf), axis)
        total -= jnp.where(keep, target * log_p, 0).sum() / BATCH
    return total / 2


@functools.cache
def reference(config: Any, **setting: float) -> Any:
    with jax.enable_x64(True):
        params, inputs = jax.tree.map(lambda a: np.asarray(a, np.float64), problem(**setting))
        grad = jax.jit(jax.value_and_grad(textbook), static_argnums=2)
        return jax.tree.map(np.asarray, grad(params, inputs, config))


def compute(params: dict, inputs: dict, config: Any, mesh: Mesh, loss_fn: Any) -> Any:
    def f(params: dict, inputs: dict) -> Any:
        scale, bias = jnp.exp(params["logit_scale"]), params["logit_bias"]
        return loss_fn(
            config, *features(params, inputs), scale, bias, caption_ids=jnp.asarray(CAPTIONS),
            mesh=mesh, axes=AXES,
        )  # fmt: skip

    inputs = jax.device_put(inputs, NamedSharding(mesh, P(AXES)))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    (loss, _), grads = jax.jit(jax.value_and_grad(f, has_aux=True))(params, inputs)
    return loss, grads


def assert_equal(got: Any, want: Any) -> None:
    """Per tensor: the largest difference is at most 1e-5 of the reference's largest value."""
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        bound = 1e-5 * np.abs(b).max()
        np.testing.assert_array_less(
            np.abs(np.asarray(a, np.float64) - b).max(), bound, jax.tree_util.keystr(path)
        )


def check(loss: str, form: str, mesh: str, options: str, block_size: int = BLOCK) -> None:
    want_loss, want = reference(LOSSES[loss](**OPTIONS[options]))
    assert want_loss >= 0.1
    config = LOSSES[loss](form=form, block_size=block_size, **OPTIONS[options])
    got_loss, got = compute(*problem(), config, make_mesh(mesh), contrastive_loss)
    if loss == "softmax":  # the bias has no part in it
        assert got["logit_bias"] == want["logit_bias"] == 0
        got, want = ({**grads, "logit_bias": np.ones(())} for grads in (got, want))
    assert_equal((got_loss, got), (want_loss, want))


@pytest.mark.parametrize(
    ("mesh", "options"),
    [("1", "options"), ("8", "plain"), ("4x2", "plain"), ("2x2x2", "options")],
)
@pytest.mark.parametrize("form", ["dense", "blocked", "ring"])
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_the_textbook(loss: str, form: str, mesh: str, options: str) -> None:
    check(loss, form, mesh, options)


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("block_size", [1, 7, 12, 1000])
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("form", ["blocked", "ring"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_block_size(loss: str, form: str, mesh: str, block_size: int, options: str) -> None:
    check(loss, form, mesh, options, block_size)


@pytest.mark.parametrize("form", ["dense", "blocked", "ring"])
@pytest.mark.parametrize("loss", LOSSES)
def test_nearly_solved_pairs_are_right_absolutely(loss: str, form: str) -> None:
    setting = {"noise": {"softmax": 0.4, "sigmoid": 0.02}[loss], "bias": -95.0}
    want = reference(LOSSES[loss](mask_same_caption=True), **setting)
    assert 1e-5 < want[0] < 1e-2
    config = LOSSES[loss](form=form, block_size=BLOCK, mask_same_caption=True)
    got = compute(*problem(**setting), config, make_mesh("4x2"), contrastive_loss)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)
