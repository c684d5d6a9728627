"""Measure the memory of each form of the contrastive losses by the TPU compiler. Nothing is run.

    python benchmarks/loss_memory.py [LOSS/FORM/BATCH ...]

For eight v5e chips (extra `tpu`), the script compiles loss value, metrics and all gradients in
float32 with embeddings of width 512, and prints the peak memory per chip.
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

from clip_jax.losses import SigmoidConfig, SoftmaxConfig, contrastive_loss

TOPOLOGY, EMBED = "v5e:2x4", 512
CASES = ("dense/32768", "blocked/32768", "ring/32768", "blocked/262144", "ring/262144")


def peak_mib(loss: str, form: str, batch: int) -> float:
    """Return the peak memory per device in MiB; the embeddings stay sharded."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    rows, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    features = jax.ShapeDtypeStruct((batch, EMBED), jnp.float32, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    config = {"softmax": SoftmaxConfig, "sigmoid": SigmoidConfig}[loss](form=form)

    value = functools.partial(contrastive_loss, config, mesh=mesh, axes=("data",))
    step = jax.jit(
        jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True),
        out_shardings=(replicated, (rows, rows, replicated, replicated)),
    )
    compiled = step.lower(features, features, scalar, scalar).compile()
    return compiled.memory_analysis().peak_memory_in_bytes / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="such as sigmoid/ring/262144; by default all")
    cases = parser.parse_args().cases
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    every = [f"{loss}/{case}" for loss in ("softmax", "sigmoid") for case in CASES]
    for name in cases or every:
        loss, form, batch = name.split("/")
        row = {"loss": loss, "form": form, "batch": int(batch)}
        print(json.dumps(row | {"peak_mib": peak_mib(loss, form, int(batch))}), flush=True)
