"""Which form is taken, what it holds and sends, what its metrics count, what is refused."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import (
    DistillationConfig,
    SigmoidConfig,
    SoftmaxConfig,
    StoredTeacher,
    cached_value_and_grad,
    caption_ids,
    choose_form,
    contrastive_loss,
    devices_per_slice,
)
from clip_jax.sharding import BATCH_AXES as AXES
from clip_jax.sharding import make_mesh
from tests.conftest import MESHES

FORMS = pytest.mark.parametrize("form", ["dense", "blocked", "ring"])


@pytest.fixture
def mesh() -> Mesh:
    return make_mesh(MESHES["4x2"])


def test_auto_takes_dense_then_blocked_then_ring() -> None:
    config = SoftmaxConfig(budget_mib=256)  # 64M float32s
    for batch, devices, form in (
        (8192, 1, "dense"),
        (8193, 1, "blocked"),
        (32768, 16, "dense"),
        (32768, 8, "blocked"),
        (131072, 8, "blocked"),
        (262144, 8, "ring"),
        (262144, 1, "blocked"),  # nobody to share with
    ):
        assert choose_form(config, batch, 512, devices) == form
    assert choose_form(SigmoidConfig(form="ring"), 8, 8, 1) == "ring"
    assert choose_form(config, 4096, 512, 1, texts=4 * 4096) == "dense"
    assert choose_form(config, 4096, 512, 1, texts=5 * 4096) == "blocked"
    of_widths = SoftmaxConfig(budget_mib=256, widths=(8, 64))  # each has a matrix of its own
    assert choose_form(of_widths, 4096, 512, 1) == "dense"
    assert choose_form(of_widths, 8192, 512, 1) == "blocked"


class Device:
    """What the mesh and the ring ask of a TPU device."""

    platform = "tpu"

    def __init__(self, id: int, slice_index: int) -> None:
        self.id, self.slice_index = id, slice_index


def test_a_ring_stays_inside_a_slice() -> None:
    def ring(slices: list[int], axes: tuple[str, ...] = AXES) -> int:
        devices = [Device(i, s) for i, s in enumerate(slices)]
        grid = np.array(devices).reshape(len(devices) // 4, 2, 2)
        return devices_per_slice(Mesh(grid, ("data", "fsdp", "tensor")), axes)

    assert ring([0] * 16) == 8
    assert ring([0] * 8 + [1] * 8) == 4
    assert ring([0] * 8 + [1] * 8, ("data",)) == 2
    assert ring([0] * 4 + [1] * 4 + [2] * 4 + [3] * 4) == 2
    assert ring([0, 1] * 8, ("data",)) == 4  # `tensor` crosses slices, the ring does not
    assert ring([0] * 4 + [1] * 4 + [0] * 4 + [1] * 4) == 1  # out of order: gather
    assert ring([0] * 12 + [1] * 4) == 1


@pytest.mark.parametrize(
    ("form", "widths"), [("dense", ()), ("blocked", ()), ("ring", ()), ("ring", (24, 8))]
)
def test_only_embeddings_and_vectors_are_gathered_and_memory_is_linear(
    form: Any, widths: tuple[int, ...], mesh: Mesh
) -> None:
    batch = 2048
    rows, replicated = NamedSharding(mesh, P(AXES)), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((batch, 16), jnp.float32, sharding=rows)
    scale = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    teachers = [
        (jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=rows),) * 2 for width in widths
    ]
    options = {"form": form, "block_size": 12}
    stored = tuple(StoredTeacher(embed_dim=width) for width in widths)
    config = DistillationConfig(teachers=stored, **options) if stored else SoftmaxConfig(**options)

    def loss(image: Any, text: Any, scale: Any, teachers: Any) -> Any:
        return contrastive_loss(config, image, text, scale, teachers=teachers, mesh=mesh, axes=AXES)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
    places = (replicated, (rows, rows, replicated))
    compiled = jax.jit(gradient, out_shardings=places).lower(x, x, scale, teachers).compile()
    text = compiled.as_text()
    assert text
    gathered = set(re.findall(r"(\w+\[[\d,]*\])\S* all-gather(?:-start)?\(", text))
    allowed = {f"f32[{batch},16]", f"s32[{batch}]", f"f32[{batch}]", f"f32[1,{batch}]"}
    by_axis = {"f32[4,256,16]", "f32[4,2,256,16]"}  # along data, then along fsdp
    assert gathered <= (allowed | by_axis if form == "dense" else allowed), gathered
    assert bool(gathered & {f"f32[{batch},16]", *by_axis}) == (form != "ring")
    # The gradient returns by a reduce-scatter, half of an all-reduce's traffic.
    reduced = re.findall(r"= \(?([^)]*?)\)? all-reduce(?:-start)?\(", text)
    assert not any(",16]" in shapes for shapes in reduced)
    assert ("reduce-scatter(" in text) == (form != "ring")
    assert ("collective-permute(" in text) == (form == "ring")
    logits = batch**2 // 8 * 4  # bytes of a device's rows
    memory = compiled.memory_analysis().temp_size_in_bytes
    assert (memory > logits) == (form == "dense")
    assert form == "dense" or memory < logits / 2


@FORMS
def test_accuracy_counts_ties_as_chance(form: str, mesh: Mesh) -> None:
    config = SoftmaxConfig(form=form, block_size=3)
    loss = jax.jit(functools.partial(contrastive_loss, config, mesh=mesh, axes=AXES))

    def accuracies(image: Any, text: Any) -> tuple[float, float]:
        _, metrics = loss(image, text, jnp.float32(100))
        return float(metrics["image_to_text_accuracy"]), float(metrics["text_to_image_accuracy"])

    identity = jnp.eye(16)
    assert accuracies(identity, identity) == (1, 1)
    assert accuracies(identity, identity[::-1]) == (0, 0)
    collapsed = jnp.broadcast_to(identity[0], identity.shape)
    assert accuracies(collapsed, collapsed) == (1 / 16, 1 / 16)
    twice = identity.at[1].set(identity[0])  # image 0 finds its text twice, image 1 finds all alike
    assert accuracies(identity, twice) == pytest.approx(((14 + 1 / 2 + 1 / 16) / 16, 15 / 16))


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


def test_invalid_input_is_named(mesh: Mesh) -> None:
    x, scale = jnp.eye(12), jnp.float32(10)
    with pytest.raises(ValueError, match=r"SoftmaxConfig has 0 teachers, but got .* of 1"):
        contrastive_loss(SoftmaxConfig(), x, x, jnp.float32(1), teachers=[(x, x)])
    with pytest.raises(ValueError, match="SigmoidConfig needs logit_bias"):
        contrastive_loss(SigmoidConfig(), x, x, scale)
    with pytest.raises(ValueError, match="caption_ids"):
        contrastive_loss(SoftmaxConfig(mask_same_caption=True), x, x, scale)
    with pytest.raises(ValueError, match="12 does not divide into 8 shards"):
        contrastive_loss(SoftmaxConfig(), x, x, scale, mesh=mesh, axes=AXES)
    with pytest.raises(ValueError, match="12 does not divide into 8 chunks"):
        cached_value_and_grad(lambda *_: ({}, {}), lambda *_: (0, {}), {}, {}, x, 8)
    with pytest.raises(ValueError, match="label_smoothing=1"):
        SoftmaxConfig(label_smoothing=1.0)
    with pytest.raises(ValueError, match="block_size=0"):
        SigmoidConfig(block_size=0)
