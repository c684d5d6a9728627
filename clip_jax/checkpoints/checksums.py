"""Checksums of arrays, the same on every mesh."""

import json
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from clip_jax.models.clip import path_name


@jax.jit
def checksums(state: Any) -> dict[str, UInt32[Array, ""]]:
    """Return a 32-bit checksum of every array of a tree, which changes if any one element does.

    It is a sum of integers that depend on each element and its position. So it is the same on every
    mesh, each device reads its own shard, and only sums are exchanged.
    """
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {path_name(path): _sum_of(x) for path, x in leaves}


def digest_of(params: Any) -> str:
    """Return a hash of a tree of arrays by their checksums, the same on every mesh."""
    sums = {name: int(x) for name, x in jax.device_get(checksums(params)).items()}
    return f"{zlib.crc32(json.dumps(sums, sort_keys=True).encode()):08x}"


@jax.jit  # arrays of one shape share what is traced
def _sum_of(x: Array) -> UInt32[Array, ""]:
    width = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, width).astype(jnp.uint32)
    weight = jnp.uint32(1)  # odd, as every factor here: no change of one element is lost
    for dim in range(x.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
        weight += index * jnp.uint32(2 * math.prod(x.shape[dim + 1 :]) % 2**32)
    mixed = (bits ^ (bits >> 16)) * weight
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x846CA68B)
    return jnp.sum(mixed ^ (mixed >> 16), dtype=jnp.uint32)
