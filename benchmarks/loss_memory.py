"""Memory of the contrastive losses in each form, by the TPU's compiler; nothing is run.

    PYTHONPATH=. python benchmarks/loss_memory.py [LOSS/FORM/BATCH ...]

On eight v5e chips, with `jax[tpu]`: value, metrics and all gradients in float32, E = 512.
"""

import functools
import json
import os
import sys

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
    """Peak MiB per device; the embeddings stay sharded."""
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
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    every = [f"{loss}/{case}" for loss in ("softmax", "sigmoid") for case in CASES]
    for name in sys.argv[1:] or every:
        loss, form, batch = name.split("/")
        row = {"loss": loss, "form": form, "batch": int(batch)}
        print(json.dumps(row | {"peak_mib": peak_mib(loss, form, int(batch))}), flush=True)
