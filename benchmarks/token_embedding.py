"""Measure what a sharded token embedding table sends and holds, with a gathered table beside it.

    python benchmarks/token_embedding.py

The TPU compiler (extra `tpu`) compiles the lookup of a batch of 32,768 texts and the gradient of
the table, alone, for SigLIP 2 B/16 and MetaCLIP 2 H/14. The script prints the MiB that a chip
receives over each mesh axis, and its peak memory. Nothing is run.
"""

import argparse
import functools
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax import sharding
from clip_jax.models import zoo
from clip_jax.pods.collectives import collectives
from clip_jax.sharding import WIDTH, MeshConfig, make_mesh

BATCH = 32_768
CASES = [  # model, topology, fsdp
    ("ViT-B-16-SigLIP2-256", "v5e:16x16", 16),
    ("ViT-H-14-quickgelu-worldwide", "v5p:4x4x8", 8),
]


def gathered(mesh: Mesh) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Look tokens up in the complete table, which every device gathers."""
    rows = P(sharding.BATCH_AXES)

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(None, WIDTH), rows), out_specs=rows, check_vma=False
    )
    def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.lax.all_gather(table, WIDTH, axis=1, tiled=True)[ids]

    return lookup


def report(name: str, topology: str, fsdp: int) -> None:
    """Print a row for each way of looking up."""
    text = zoo.get(name).text
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(MeshConfig(fsdp=fsdp), devices)
    lies, rows = NamedSharding(mesh, P(None, WIDTH)), sharding.batch_sharding(mesh)
    shape = (BATCH, text.context_length)
    table = jax.ShapeDtypeStruct((text.vocab_size, text.width), jnp.float32, sharding=lies)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    slope = jax.ShapeDtypeStruct((*shape, text.width), jnp.float32, sharding=rows)
    for how, lookup in (("rows sent", sharding.layout(mesh).lookup), ("gathered", gathered(mesh))):

        def value(table, ids, slope, lookup=lookup):
            return (lookup(table, ids) * slope).sum()

        places = (sharding.replicated(mesh), lies)
        step = jax.jit(jax.value_and_grad(value), out_shardings=places)
        compiled = step.lower(table, ids, slope).compile()
        received: dict[str, float] = defaultdict(float)
        for x in collectives(compiled.as_text(), mesh.shape):
            received["/".join(x.axes)] += x.received / 2**20
        peak = compiled.memory_analysis().peak_memory_in_bytes / 2**20
        moved = " | ".join(f"{received[axis]:,.0f}" for axis in ("fsdp", "data"))
        case = f"{text.vocab_size:,} × {text.width:,}, {topology}"
        print(f"| {case} | {how} | {moved} | {peak:,.0f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("case", nargs="?", type=int, help=argparse.SUPPRESS)
    case = parser.parse_args().case
    if case is None:  # one process for each case, since the compiler is loaded once per process
        quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
        for i in range(len(CASES)):
            subprocess.run([sys.executable, __file__, str(i)], env=os.environ | quiet, check=True)
    else:
        jax.config.update("jax_platforms", "cpu")
        report(*CASES[case])
