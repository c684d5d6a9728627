"""Which form is taken, what it holds and sends, what its metrics count, what it refuses."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import clip_jax.losses
from clip_jax.losses import (
    SigmoidConfig,
    SoftmaxConfig,
    caption_ids,
    choose_form,
    contrastive_loss,
    devices_per_slice,
)

AXES = ("data", "fsdp")
WAYS = ("image_to_text", "text_to_image")
FORMS = ["dense", "blocked", "ring"]


@pytest.fixture
def mesh() -> Mesh:
    devices = np.array(jax.devices()).reshape(4, 2)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)


def unit(seed: int, batch: int, embed_dim: int = 16) -> jax.Array:
    x = np.random.default_rng(seed).normal(size=(batch, embed_dim))
    return jnp.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), jnp.float32)


def test_auto_takes_dense_then_blocked_then_ring() -> None:
    config = SoftmaxConfig(budget_mib=256)  # 64M float32s
    assert choose_form(config, 8192, 512, 1) == "dense"
    assert choose_form(config, 8193, 512, 1) == "blocked"
    assert choose_form(config, 32768, 512, 16) == "dense"
    assert choose_form(config, 32768, 512, 8) == "blocked"
    assert choose_form(config, 131072, 512, 8) == "blocked"
    assert choose_form(config, 262144, 512, 8) == "ring"
    assert choose_form(config, 262144, 512, 1) == "blocked"  # nobody to share with
    assert choose_form(SigmoidConfig(form="ring"), 8, 8, 1) == "ring"


class Device:
    """Stands for a TPU device: all that the mesh and the ring ask of it."""

    platform = "tpu"

    def __init__(self, id: int, slice_index: int) -> None:
        self.id, self.slice_index = id, slice_index


def test_a_ring_stays_inside_a_slice() -> None:
    def ring(slices: Any, axes: tuple[str, ...] = AXES) -> int:
        devices = [Device(i, s) for i, s in enumerate(np.ravel(slices))]
        shape = (len(devices) // 4, 2, 2)
        return devices_per_slice(
            Mesh(np.array(devices).reshape(shape), ("data", "fsdp", "tensor")), axes
        )

    assert ring([0] * 16) == 8
    assert ring([0] * 8 + [1] * 8) == 4
    assert ring([0] * 8 + [1] * 8, ("data",)) == 2
    assert ring([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4) == 2
    assert ring([0, 1] * 8, ("data",)) == 4  # `tensor` crosses slices, the ring does not
    assert ring([0] * 4 + [1] * 4 + [0] * 4 + [1] * 4) == 1  # out of order: gather
    assert ring([0] * 12 + [1] * 4) == 1


def test_rings_gather_from_each_other(mesh: Mesh, monkeypatch: Any) -> None:
    monkeypatch.setattr(clip_jax.losses, "devices_per_slice", lambda *_: 2)  # four rings
    inputs = unit(0, 48), unit(1, 48), jnp.float32(20), jnp.float32(-10)

    def grads(form: str) -> Any:
        config = SigmoidConfig(form=form, block_size=5)
        loss = functools.partial(contrastive_loss, config, mesh=mesh, axes=AXES)
        grad = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
        return jax.jit(grad)(*inputs)

    for a, b in zip(jax.tree.leaves(grads("ring")), jax.tree.leaves(grads("dense")), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def compiled(config: Any, batch: int, mesh: Mesh) -> Any:
    rows, whole = NamedSharding(mesh, P(AXES)), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((batch, 16), jnp.float32, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)

    def loss(image: Any, text: Any, scale: Any, bias: Any) -> Any:
        return contrastive_loss(config, image, text, scale, bias, mesh=mesh, axes=AXES)[0]

    grad = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    shardings = (whole, (rows, rows, whole, whole))
    return jax.jit(grad, out_shardings=shardings).lower(x, x, scale, scale).compile()


@pytest.mark.parametrize("form", FORMS)
def test_only_features_and_vectors_are_gathered(form: str, mesh: Mesh) -> None:
    text = compiled(SoftmaxConfig(form=form, block_size=12), 192, mesh).as_text()
    gathered = set(re.findall(r"(\w+\[[\d,]*\])\S* all-gather(?:-start)?\(", text))
    assert gathered <= {"f32[192,16]", "s32[192]", "f32[192]", "f32[1,192]"}, gathered
    assert ("f32[192,16]" in gathered) == (form != "ring")
    assert ("collective-permute(" in text) == (form == "ring")


@pytest.mark.parametrize("form", ["blocked", "ring"])
def test_memory_grows_with_the_batch_not_its_square(form: str, mesh: Mesh) -> None:
    def size(batch: int) -> int:
        config = SigmoidConfig(form=form, block_size=8)
        return compiled(config, batch, mesh).memory_analysis().temp_size_in_bytes

    assert size(4096) < 2.2 * size(2048)


@pytest.mark.parametrize("form", FORMS)
def test_accuracy_counts_ties_as_chance(form: str, mesh: Mesh) -> None:
    def accuracies(image: Any, text: Any) -> tuple[float, ...]:
        config = SoftmaxConfig(form=form, block_size=3)
        loss = jax.jit(functools.partial(contrastive_loss, config, mesh=mesh, axes=AXES))
        _, metrics = loss(image, text, jnp.float32(100))
        return tuple(float(metrics[f"{way}_accuracy"]) for way in WAYS)

    one = jnp.eye(16)
    assert accuracies(one, one) == (1, 1)
    assert accuracies(one, one[::-1]) == (0, 0)
    collapsed = jnp.broadcast_to(one[0], one.shape)
    assert accuracies(collapsed, collapsed) == (1 / 16, 1 / 16)
    twice = one.at[1].set(one[0])  # image 0 finds its text twice, image 1 finds all alike
    assert accuracies(one, twice) == pytest.approx(((14 + 1 / 2 + 1 / 16) / 16, 15 / 16))
    image, text = unit(0, 16), unit(1, 16)
    image = image + text
    logits = np.asarray(image @ text.T)
    want = [np.mean(logits.argmax(axis) == np.arange(16)) for axis in (1, 0)]
    assert accuracies(image, text) == pytest.approx(want)


def test_a_masked_pair_is_no_competitor() -> None:
    eye = jnp.eye(4)
    same = eye.at[1].set(eye[0])  # texts 0 and 1 are equal
    config = SoftmaxConfig(mask_same_caption=True)
    ids = jnp.array([7, 7, 8, 9])
    _, metrics = contrastive_loss(config, same, same, jnp.float32(100), caption_ids=ids)
    assert metrics["image_to_text_accuracy"] == metrics["text_to_image_accuracy"] == 1


def test_captions_are_numbered_like_numpy_unique() -> None:
    draw = np.random.default_rng(0).integers
    tokens = np.concatenate([draw(0, 49408, (300, 77)), draw(0, 2, (300, 77)) * np.arange(77)])
    tokens[::5] = tokens[draw(0, 600, 120)]
    tokens[1::7, 3:] = 0  # few distinct rows: same beginnings, padded
    tokens[1::7, 1:3] = draw(0, 3, tokens[1::7, 1:3].shape)
    tokens[1::7, 0] = 49406
    ids = np.asarray(jax.jit(caption_ids)(jnp.asarray(tokens, jnp.int32)))
    same = np.unique(tokens, axis=0, return_inverse=True)[1].ravel()
    assert 300 < len(np.unique(same)) < 520
    np.testing.assert_array_equal(ids[:, None] == ids, same[:, None] == same)


def test_refusals_say_what_to_change(mesh: Mesh) -> None:
    x, scale = unit(0, 12), jnp.float32(10)
    with pytest.raises(ValueError, match="init_logit_bias"):
        contrastive_loss(SigmoidConfig(), x, x, scale)
    with pytest.raises(ValueError, match="caption_ids"):
        contrastive_loss(SoftmaxConfig(mask_same_caption=True), x, x, scale)
    with pytest.raises(ValueError, match="12 does not divide into 8 shards"):
        contrastive_loss(SoftmaxConfig(), x, x, scale, mesh=mesh, axes=AXES)
    with pytest.raises(ValueError, match="label_smoothing=1"):
        SoftmaxConfig(label_smoothing=1.0)
    with pytest.raises(ValueError, match="block_size=0"):
        SigmoidConfig(block_size=0)
