"""The caption loss in chunks: a float64 reference in value and gradient, on every mesh.

Run as a script it prints its memory at L/14 beside the unchunked one ("Caption loss" in
BENCHMARKS.md).
"""

import functools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import Axes, CaptionConfig, caption_loss, count_labels
from clip_jax.refused import Refused

AXES = Axes(("data", "fsdp"), "fsdp", "tensor")
B, L, D, V = 16, 7, 8, 20
SHAPES = {"1": (1, 1, 1), "8": (8, 1, 1), "4x2": (4, 2, 1), "2x2x2": (2, 2, 2)}


@functools.cache
def setting():
    rng = np.random.default_rng(0)
    labels = rng.integers(1, V, (B, L), np.int32)
    for row, end in enumerate(rng.integers(1, L + 1, B)):
        labels[row, end:] = 0
    labels[3] = 0  # nothing to write
    states, kernel, weights = (
        rng.normal(size=(B, L, D)),
        rng.normal(size=(D, V)),
        rng.normal(size=B),
    )
    return states, kernel, labels, weights


@functools.cache
def reference():
    """Each row's loss, and the gradient of its weighted sum, in float64."""
    states, kernel, labels, weights = setting()
    logits = states @ kernel
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    real = labels != 0
    one_hot = np.eye(V)[labels]
    rows = -(np.log((shares * one_hot).sum(-1)) * real).sum(1)
    d_logits = (shares - one_hot) * real[..., None] * weights[:, None, None]
    return rows, d_logits @ kernel.T, np.einsum("BLD,BLV->DV", states, d_logits)


def check(chunk_size, mesh=None):
    states, kernel, labels, weights = setting()
    arrays = [jnp.asarray(x, jnp.float32) for x in (states, kernel)]
    labels, weights = jnp.asarray(labels), jnp.asarray(weights, jnp.float32)
    if mesh is not None:
        rows, table = NamedSharding(mesh, P(AXES.rows)), NamedSharding(mesh, P("fsdp", "tensor"))
        arrays = [jax.device_put(arrays[0], rows), jax.device_put(arrays[1], table)]
        labels = jax.device_put(labels, rows)

    def weighted(states, kernel):
        options = {} if mesh is None else {"mesh": mesh, "axes": AXES}
        rows = caption_loss(states, kernel, labels, pad_id=0, chunk_size=chunk_size, **options)
        return (weights * rows).sum(), rows

    got = jax.jit(jax.grad(weighted, argnums=(0, 1), has_aux=True))(*arrays)
    (d_states, d_kernel), rows = jax.device_get(got)
    for a, b in zip((rows, d_states, d_kernel), reference(), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("chunk_size", [1, 5, 16, B * L, 1_000])
def test_any_chunk_is_the_dense_loss_in_float64(chunk_size):
    check(chunk_size)


@pytest.mark.parametrize("shape", SHAPES)
def test_any_mesh_is_the_dense_loss_in_float64(shape):
    sizes = SHAPES[shape]
    devices = np.array(jax.devices()[: np.prod(sizes)]).reshape(sizes)
    check(3, Mesh(devices, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3))


def test_bfloat16_states_get_a_bfloat16_gradient_and_the_kernel_a_float32_one():
    states, kernel, labels, _ = map(jnp.asarray, setting())
    loss = lambda s, k: caption_loss(s, k, labels, pad_id=0, chunk_size=8).sum()  # noqa: E731
    got = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        jnp.asarray(states, jnp.bfloat16), jnp.asarray(kernel, jnp.float32)
    )
    assert [x.dtype for x in got] == [jnp.bfloat16, jnp.float32]


def test_no_logits_of_all_positions_are_held():
    states, kernel, labels, _ = map(jnp.asarray, setting())
    loss = lambda s, k: caption_loss(s, k, labels, pad_id=0, chunk_size=8).sum()  # noqa: E731
    arrays = [jnp.asarray(x, jnp.float32) for x in (states, kernel)]
    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays).as_text()
    assert f"tensor<8x{V}xf32>" in text
    assert f"{B * L}x{V}x" not in text
    assert f"{B}x{L}x{V}x" not in text


def test_labels_are_counted_and_weights_checked():
    assert count_labels(jnp.array([[3, 2, 0], [0, 0, 0]]), 0) == 2
    assert count_labels(jnp.zeros((2, 3), jnp.int32), 0) == 1
    with pytest.raises(Refused, match="nothing would train"):
        CaptionConfig(weight=0.0, contrastive_weight=0.0)


# ------------------------------------------------------------------ memory, by the TPU's compiler

BATCH, TOKENS, WIDTH, WORDS = 32_768, 75, 768, 49_408  # coca_ViT-L-14


def dense_loss(states, kernel, labels):
    """What is written without thought: all logits at once, differentiated by JAX."""
    logits = jnp.einsum("BLD,DV->BLV", states, kernel.astype(states.dtype)).astype(jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return -jnp.where(labels != 0, picked, 0).sum(1)


def peak_gib(which: str) -> float:
    """Peak GiB per chip of value and gradient on v5e:16x16, rows over all, the kernel over 16."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:16x16").devices
    shape = np.array(devices).reshape(16, 16, 1)
    mesh = Mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    rows, table = NamedSharding(mesh, P(AXES.rows)), NamedSharding(mesh, P("fsdp", "tensor"))
    states = jax.ShapeDtypeStruct((BATCH, TOKENS, WIDTH), jnp.bfloat16, sharding=rows)
    kernel = jax.ShapeDtypeStruct((WIDTH, WORDS), jnp.float32, sharding=table)
    labels = jax.ShapeDtypeStruct((BATCH, TOKENS), jnp.int32, sharding=rows)
    chunk = CaptionConfig().chunk_size
    chunked = functools.partial(caption_loss, pad_id=0, chunk_size=chunk, mesh=mesh, axes=AXES)
    function = {"chunked": chunked, "dense": dense_loss}[which]
    step = jax.jit(
        jax.value_and_grad(lambda s, k, y: function(s, k, y).sum(), argnums=(0, 1)),
        out_shardings=(NamedSharding(mesh, P()), (rows, table)),
    )
    compiled = step.lower(states, kernel, labels).compile()
    return compiled.memory_analysis().peak_memory_in_bytes / 2**30


@pytest.mark.slow
def test_chunks_take_less_memory_on_a_pod():
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install jax[tpu]")
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, __file__, "chunked", "dense"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    chunked, dense = (json.loads(line)["peak_gib"] for line in result.stdout.splitlines())
    assert chunked < dense / 4


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    for case in sys.argv[1:]:
        print(json.dumps({"loss": case, "peak_gib": round(peak_gib(case), 2)}))
