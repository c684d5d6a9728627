"""Measure the memory of each form of the contrastive losses by the TPU compiler. Nothing is run.

    python benchmarks/loss_memory.py [--topology v5e:2x4] [LOSS/FORM/BATCH ...]

For v5e chips (extra `tpu`), the script compiles loss value, metrics and all gradients in float32
with embeddings of width 512, and prints the peak memory per chip. The loss `distillation` has two
teachers of width 768.
"""

import argparse
import json
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import DistillationConfig, SigmoidConfig, SoftmaxConfig, contrastive_loss

EMBED, TEACHERS = 512, (768, 768)
LOSSES = {"softmax": SoftmaxConfig, "sigmoid": SigmoidConfig, "distillation": DistillationConfig}
CASES = ("dense/32768", "blocked/32768", "ring/32768", "blocked/262144", "ring/262144")


def peak_mib(loss: str, form: str, batch: int, topology: str) -> float:
    """Return the peak memory per device in MiB; the embeddings stay sharded."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    rows, replicated = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())

    def features(width: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, width), jnp.float32, sharding=rows)

    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated)
    widths = TEACHERS if loss == "distillation" else ()
    teachers = [(features(width), features(width)) for width in widths]

    def value(image: Any, text: Any, scale: Any, bias: Any, teachers: Any) -> Any:
        return contrastive_loss(
            LOSSES[loss](form=form),
            image,
            text,
            scale,
            bias,
            teachers=teachers,
            mesh=mesh,
            axes=("data",),
        )

    step = jax.jit(
        jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True),
        out_shardings=(replicated, (rows, rows, replicated, replicated)),
    )
    compiled = step.lower(features(EMBED), features(EMBED), scalar, scalar, teachers).compile()
    return compiled.memory_analysis().peak_memory_in_bytes / 2**20


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help="such as sigmoid/ring/262144; by default all")
    parser.add_argument("--topology", default="v5e:2x4", help="chips, such as v5e:16x16")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    every = [f"{loss}/{case}" for loss in LOSSES for case in CASES]
    for name in args.cases or every:
        loss, form, batch = name.split("/")
        row = {"loss": loss, "form": form, "batch": int(batch), "topology": args.topology}
        peak = peak_mib(loss, form, int(batch), args.topology)
        print(json.dumps(row | {"peak_mib": peak}), flush=True)
