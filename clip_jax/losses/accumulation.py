"""Gradients of one big batch in the memory of a small one (GradCache: Gao et al. 2021)."""

from collections.abc import Callable
from typing import Any

import jax
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float

from clip_jax.errors import InputError

Features = tuple[Float[Array, "B ..."], ...]
Encode = Callable[[Any, Any], tuple[Features, Any]]


def cached_value_and_grad(
    encode: Encode,
    loss_fn: Callable[..., tuple[Array, Any]],
    params: Any,
    batch: Any,
    num_chunks: int,
    *,
    group_size: int = 1,
) -> tuple[tuple[Array, Any], Any]:
    """Differentiate `loss_fn(params, *features) -> (loss, aux)`, encoding chunk by chunk.

    `encode(params, chunk)` gives ((image features, text features, ...), statistics) of a chunk of
    `batch`, a tree of arrays [B, ...]. It runs twice per chunk, so what it draws must follow from
    the chunk; only features [B, E] and one chunk's activations are held. Returns ((loss, (aux,
    statistics averaged over the chunks)), gradient), exactly those of one big batch; `loss_fn` sees
    the batch's own order.

    A chunk takes every `num_chunks`-th run of `group_size` rows (those that share a BatchNorm).
    With B sharded contiguously and `num_chunks` · `group_size` a divisor of the rows per device,
    every device so keeps its own rows. Raises InputError if B isn't divisible by that product.
    """

    def split(x: Array) -> Array:
        return rearrange(x, "(Q N G) ... -> N (Q G) ...", N=num_chunks, G=group_size)

    def join(x: Array) -> Array:
        return rearrange(x, "N (Q G) ... -> (Q N G) ...", G=group_size)

    size = len(jax.tree.leaves(batch)[0])
    if size % (num_chunks * group_size):
        raise InputError(
            f"A batch of {size} does not divide into {num_chunks} chunks of whole groups of "
            f"{group_size}: change the batch size or the number of chunks."
        )
    chunks = jax.tree.map(split, batch)

    _, (features, statistics) = lax.scan(
        lambda _, chunk: (None, encode(params, chunk)), None, chunks
    )
    features = jax.tree.map(join, features)
    statistics = jax.tree.map(lambda x: x.mean(0), statistics)

    grad_fn = jax.value_and_grad(lambda p, f: loss_fn(p, *f), argnums=(0, 1), has_aux=True)
    (loss, aux), (grads, d_features) = grad_fn(params, features)

    def pull_back(grads: Any, inputs: Any) -> tuple[Any, None]:
        chunk, d_chunk = inputs
        _, vjp = jax.vjp(lambda p: encode(p, chunk)[0], params)
        return jax.tree.map(lambda a, b: a + b, grads, *vjp(d_chunk)), None

    grads, _ = lax.scan(pull_back, grads, (chunks, jax.tree.map(split, d_features)))
    return (loss, (aux, statistics)), grads
