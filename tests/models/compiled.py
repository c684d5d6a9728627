"""Attention and its gradient, compiled for a TPU that is not there.

short|xla TOPOLOGY LENGTH,HEADS,DIM,CAUSAL ...; the test starts it, since a process that has seen
one platform's devices compiles for no other. Prints a line for each shape, once it is compiled: how
many kernels it has, and the products of a matrix [L, L] in float32, with their precision.
"""

import re
import sys

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from clip_jax.models import attention
from clip_jax.models.short_attention import short
from clip_jax.pods import compile as pod
from clip_jax.pods.topology import Topology

ROWS = 16


def products_of_scores(text: str, length: int) -> list[str]:
    """Convolutions of an operand [.., L, L] in float32: the precision that each asks for."""
    of_name = dict(re.findall(r"^\s*(?:ROOT )?(%\S+) = (\w+\[[\d,]*\])", text, re.MULTILINE))
    found = []
    for line in text.splitlines():
        if product := re.search(r" convolution\(([^)]*)\)", line):
            types = [of_name.get(name, "") for name in product[1].split(", ")]
            if any(x.startswith("f32") and x.endswith(f",{length},{length}]") for x in types):
                precision = re.search(r"operand_precision={([^}]*)}", line)
                found.append(precision[1] if precision else "default")
    return found


def main(backend: str, topology: str, *shapes: str) -> None:
    place = SingleDeviceSharding(pod._devices(Topology.parse(topology))[0])
    for shape in shapes:
        length, heads, dim, causal = map(int, shape.split(","))

        def attend(qkv, heads=heads, causal=bool(causal)):
            if backend == "xla":
                return attention.xla(qkv, heads, causal)
            return short(qkv, None, heads, causal, lambda kernel, _: kernel, False)

        def total(qkv, weight, attend=attend):
            return (attend(qkv).astype(jnp.float32) * weight).sum()

        sizes = ((ROWS, length, n * heads * dim) for n in (3, 1))
        qkv, weight = (jax.ShapeDtypeStruct(x, jnp.bfloat16, sharding=place) for x in sizes)
        text = jax.jit(jax.value_and_grad(total)).lower(qkv, weight).compile().as_text()
        kernels = text.count('custom_call_target="tpu_custom_call"')
        print(shape, kernels, *products_of_scores(text, length), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
