"""Find equal captions in a batch, so that their pairs need not count as negatives."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt


def caption_ids(tokens: Int[Array, "B L"]) -> Int[Array, " B"]:
    """Number the distinct rows of a batch: two captions get one number if they are equal.

    Rows are compared by 64 bits of hash, so that no [B, B] is built and only [B] vectors are
    sorted: in a batch of 32,768 all different, two share a number with a chance of 3e-11, and then
    one negative in 10⁹ is left out. The numbers depend on the batch, never on the mesh.
    """
    low, high = _hash(tokens, 0x9E3779B9), _hash(tokens, 0x7F4A7C15)
    low, high, order = jax.lax.sort((low, high, jnp.arange(len(tokens))), num_keys=2)
    new = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    number = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(new, dtype=jnp.int32)])
    return jnp.zeros_like(number).at[order].set(number)


def _hash(tokens: Int[Array, "B L"], seed: int) -> UInt[Array, " B"]:
    """Add up one well-mixed 32-bit word per (position, token), as in Zobrist hashing."""
    position = _mix(jnp.arange(tokens.shape[1], dtype=jnp.uint32) + jnp.uint32(seed))
    return _mix(tokens.astype(jnp.uint32) ^ position).sum(1, dtype=jnp.uint32)


def _mix(x: UInt[Array, "*B"]) -> UInt[Array, "*B"]:
    """Map 32 bits to 32 bits, one to one and without pattern (MurmurHash3's finalizer)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
