"""The kernel for short sequences, compiled for a TPU that is not there.

TOPOLOGY LENGTH,HEADS,DIM,CAUSAL ...; the test starts it, since a process that has seen one
platform's devices compiles for no other. Prints a line for each shape, once it is compiled.
"""

import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from clip_jax.models.short_attention import short
from clip_jax.pods import compile as pod
from clip_jax.pods.topology import Topology

ROWS = 16


def main(topology: str, *shapes: str) -> None:
    place = SingleDeviceSharding(pod._devices(Topology.parse(topology))[0])
    for shape in shapes:
        length, heads, dim, causal = map(int, shape.split(","))

        def total(qkv, heads=heads, causal=bool(causal)):
            out = short(qkv, None, heads, causal, lambda kernel, _: kernel, False)
            return out.astype(jnp.float32).sum()

        size = (ROWS, length, 3 * heads * dim)
        qkv = jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=place)
        text = jax.jit(jax.value_and_grad(total)).lower(qkv).compile().as_text()
        print(shape, text.count('custom_call_target="tpu_custom_call"'), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
