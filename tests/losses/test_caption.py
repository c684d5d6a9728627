"""The caption loss in chunks: a float64 reference in value and gradient, on meshes too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.errors import InputError
from clip_jax.losses import Axes, CaptionConfig, caption_loss, count_labels
from clip_jax.sharding import make_mesh
from tests.conftest import MESHES

AXES = Axes(("data", "fsdp"), "fsdp", "tensor")
B, L, D, V = 16, 7, 8, 20


@functools.cache
def setting():
    rng = np.random.default_rng(0)
    labels = rng.integers(1, V, (B, L), np.int32)
    for row, end in enumerate(rng.integers(1, L + 1, B)):
        labels[row, end:] = 0
    labels[3] = 0  # nothing to write
    states, kernel = rng.normal(size=(B, L, D)), rng.normal(size=(D, V))
    return states, kernel, rng.normal(size=V), labels, rng.normal(size=B)


@functools.cache
def reference():
    """Each row's loss, and the gradient of its weighted sum, in float64."""
    states, kernel, bias, labels, weights = setting()
    logits = states @ kernel + bias
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    real = labels != 0
    one_hot = np.eye(V)[labels]
    rows = -(np.log((shares * one_hot).sum(-1)) * real).sum(1)
    d_logits = (shares - one_hot) * real[..., None] * weights[:, None, None]
    d_kernel = np.einsum("BLD,BLV->DV", states, d_logits)
    return rows, d_logits @ kernel.T, d_kernel, d_logits.sum((0, 1))


@pytest.mark.parametrize(
    ("chunk_size", "mesh_name"),
    [(1, None), (5, None), (B * L, None), (1_000, None), (3, "8"), (3, "2x2x2")],
)
def test_any_chunk_on_any_mesh_is_the_dense_loss_in_float64(chunk_size, mesh_name):
    *arrays, labels, weights = setting()
    arrays = [jnp.asarray(x, jnp.float32) for x in arrays]
    labels, weights, options = jnp.asarray(labels), jnp.asarray(weights, jnp.float32), {}
    if mesh_name:
        mesh = make_mesh(MESHES[mesh_name])
        rows, table = NamedSharding(mesh, P(AXES.rows)), NamedSharding(mesh, P("fsdp", "tensor"))
        words = NamedSharding(mesh, P("tensor"))
        arrays = [*map(jax.device_put, arrays, (rows, table, words))]
        labels, options = jax.device_put(labels, rows), {"mesh": mesh, "axes": AXES}

    def weighted(states, kernel, bias):
        sizes = {"pad_id": 0, "chunk_size": chunk_size}
        rows = caption_loss(states, kernel, labels, bias=bias, **sizes, **options)
        return (weights * rows).sum(), rows

    got = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*arrays)
    gradients, rows = jax.device_get(got)
    for a, b in zip((rows, *gradients), reference(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


def test_no_logits_of_all_positions_are_held_and_gradients_keep_their_dtypes():
    states, kernel, _, labels, _ = map(jnp.asarray, setting())
    states, kernel = states.astype(jnp.bfloat16), kernel.astype(jnp.float32)

    def loss(states, kernel):
        return caption_loss(states, kernel, labels, pad_id=0, chunk_size=8).sum()

    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(states, kernel)
    assert [x.dtype for x in lowered.out_info] == [jnp.bfloat16, jnp.float32]
    text = lowered.as_text()
    assert f"tensor<8x{V}xf32>" in text
    assert f"{B * L}x{V}x" not in text
    assert f"{B}x{L}x{V}x" not in text


def test_labels_are_counted_and_the_weight_checked():
    assert count_labels(jnp.array([[3, 2, 0], [0, 0, 0]]), 0) == 2
    assert count_labels(jnp.zeros((2, 3), jnp.int32), 0) == 1
    with pytest.raises(InputError, match=r"CaptionConfig\.weight=-1\.0 must be at least 0"):
        CaptionConfig(weight=-1.0)
