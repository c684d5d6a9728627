"""Memory of the loss alone, compiled for a TPU slice, and the ÷N trap as it stands in jax: the
reason for the shape of `losses/streamed.py`.

Run as a script it prints the rows of "Loss memory" in BENCHMARKS.md.
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
from jax import lax
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from clip_jax.losses import SigmoidConfig, SoftmaxConfig, contrastive_loss

TOPOLOGY, EMBED = "v5e:2x4", 512


def peak_mib(loss: str, form: str, batch: int) -> float:
    """Peak MiB per device of value, metrics and gradient in float32; features stay sharded."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    features = jax.ShapeDtypeStruct((batch, EMBED), jnp.float32, sharding=rows)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    config = {"softmax": SoftmaxConfig, "sigmoid": SigmoidConfig}[loss](form=form)

    value = functools.partial(contrastive_loss, config, mesh=mesh, axes=("data",))
    step = jax.jit(
        jax.value_and_grad(value, argnums=(0, 1, 2, 3), has_aux=True),
        out_shardings=(whole, (rows, rows, whole, whole)),
    )
    compiled = step.lower(features, features, scalar, scalar).compile()
    return compiled.memory_analysis().peak_memory_in_bytes / 2**20


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_ring_of_eight_times_the_batch_takes_less_than_dense(loss: str) -> None:
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu: pip install jax[tpu]")
    # In its own process: the compiler reads its environment once, when it is loaded.
    environment = os.environ | {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    cases = [f"{loss}/dense/32768", f"{loss}/ring/262144"]
    command = [sys.executable, __file__, *cases]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    dense, ring = (json.loads(line)["peak_mib"] for line in result.stdout.splitlines())
    assert ring < dense


@jax.custom_vjp
def local_loss(x: jax.Array) -> jax.Array:
    return lax.psum((x**2).sum(), "data")


local_loss.defvjp(lambda x: (local_loss(x), x), lambda x, cotangent: (2 * x * cotangent,))


def test_custom_vjp_inside_a_shard_map_divides_by_the_shards() -> None:
    """Here for whoever moves it inside; if this fails, jax has changed and `streamed` may too."""
    mesh = Mesh(np.array(jax.devices()), ("data",), axis_types=(AxisType.Auto,))

    loss = jax.shard_map(local_loss, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False)
    x = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, P("data")))
    value, slope = jax.jit(jax.value_and_grad(lambda w: loss(w * x)))(3.0)
    assert value == 9 * 140
    assert slope == pytest.approx(6 * 140 / 8)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    every = [
        f"{loss}/{case}"
        for loss in ("softmax", "sigmoid")
        for case in ("dense/32768", "blocked/32768", "ring/32768", "blocked/262144", "ring/262144")
    ]
    for name in sys.argv[1:] or every:
        loss, form, batch = name.split("/")
        row = {"loss": loss, "form": form, "batch": int(batch)}
        print(json.dumps(row | {"peak_mib": peak_mib(loss, form, int(batch))}), flush=True)
