"""Measure the memory of the caption loss, in chunks and with all logits at once. Nothing is run.

    python benchmarks/caption_memory.py [chunked] [dense]

The TPU compiler (extra `tpu`) compiles the loss and its gradients alone, with the sizes of
coca_ViT-L-14 at a batch of 32,768 on v5e:16x16, and reports the peak memory of a chip.
"""

import argparse
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import Axes, CaptionConfig, caption_loss

AXES = Axes(("data", "fsdp"), "fsdp", "tensor")
BATCH, TOKENS, WIDTH, WORDS = 32_768, 75, 768, 49_408


def dense_loss(states, kernel, labels):
    """Compute the loss in the plain way: all logits at once, differentiated by JAX."""
    logits = jnp.einsum("BLD,DV->BLV", states, kernel.astype(states.dtype)).astype(jnp.float32)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
    return -jnp.where(labels != 0, picked, 0).sum(1)


def peak_gib(which: str) -> float:
    """Return the peak memory per chip in GiB; rows are split over all chips, the kernel over 16."""
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("losses", nargs="*", help="chunked, dense or both (the default)")
    losses = parser.parse_args().losses or ("chunked", "dense")
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for case in losses:
        print(json.dumps({"loss": case, "peak_gib": round(peak_gib(case), 2)}), flush=True)
