"""Random keys of initial weights, whose programs compile in a fraction of Threefry's time.

Initialisation draws each parameter with a key of its own, and each key is a hash of its parent's.
XLA compiles Threefry's twenty rounds anew for each of these; that took longer than any other part
of a small run but the compilation of its step.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.random import define_prng_impl
from jaxtyping import Array, Integer, UInt32

_GOLDEN = 0x9E3779B9  # 2³² / golden ratio, which sets adjacent seeds and counters far apart


def initial_key(seed: int) -> Array:
    """Return a key for initial weights: the same bits on every backend and mesh.

    It is no key for anything that must resist a guess, nor for more than 2³² numbers at once.
    """
    return jax.random.key(seed, impl=_HASH)


@jax.jit  # traced once for each shape
def _mix(x: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
    """Permute the 32-bit words so that each bit depends on all others (lowbias32 of C. Wellons'
    hash-prospector, 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@jax.jit
def _hash(key: UInt32[Array, " 2"], counter: UInt32[Array, "*S"]) -> UInt32[Array, "*S"]:
    """Hash counters with both words of a key, in three rounds."""
    return _mix(_mix(_mix(counter * jnp.uint32(_GOLDEN) + key[0]) + key[1]) ^ key[0])


def _seed(seed: Integer[Array, ""]) -> UInt32[Array, " 2"]:
    return _child(jnp.zeros(2, jnp.uint32), seed)


@jax.jit
def _child(key: UInt32[Array, " 2"], number: Array | int) -> UInt32[Array, " 2"]:
    """Return the key that a number names: two words of a hash that random bits never ask for."""
    words = jnp.stack([jnp.uint32(1), jnp.uint32(2)])
    return _hash(~key, _mix(jnp.asarray(number).astype(jnp.uint32)) + words)


def _split(key: UInt32[Array, " 2"], shape: tuple[int, ...]) -> UInt32[Array, "*S 2"]:
    numbers = jnp.arange(math.prod(shape), dtype=jnp.uint32)
    return jax.vmap(lambda x: _child(key, x))(numbers).reshape(*shape, 2)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _bits(key: UInt32[Array, " 2"], width: int, shape: tuple[int, ...]) -> UInt32[Array, "*S"]:
    """Hash the position of each element, so that every device computes those that it holds."""
    assert width == 32, "initial weights are float32"
    counter, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        counter, stride = counter + along * jnp.uint32(stride % 2**32), stride * shape[axis]
    return _hash(key, counter)


_HASH = define_prng_impl(
    key_shape=(2,),
    seed=_seed,
    split=_split,
    random_bits=_bits,
    fold_in=_child,
    name="hash",
    tag="hash",
)
