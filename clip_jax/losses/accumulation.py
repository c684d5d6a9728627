"""Gradient accumulation with the negatives of the full batch (GradCache: Gao et al. 2021)."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jaxtyping import Array, Float, Shaped

from clip_jax.errors import InputError
from clip_jax.losses.objective import Outputs


class Gradients(NamedTuple):
    """A loss with its gradients and outputs."""

    loss: Float[Array, ""]
    aux: Any  # auxiliary output of the loss
    outputs: Outputs  # of the towers, for the global batch
    statistics: Any  # of the towers, averaged over the chunks
    params: Any  # gradient of the towers' parameters
    others: Any  # gradient of the parameters that only the loss takes


def cached_value_and_grad(
    encode: Callable[[Any, Any], tuple[Outputs, Any]],
    loss_fn: Callable[[Any, Outputs], tuple[Array, Any]],
    params: Any,
    others: Any,
    batch: Any,
    num_chunks: int = 1,
    *,
    group_size: int = 1,
) -> Gradients:
    """Differentiate `loss_fn(others, outputs) -> (loss, aux)`, encoding chunk by chunk.

    `encode(params, chunk)` returns (outputs by name, statistics) of a chunk of `batch`, a tree of
    arrays [B, ...]. A single chunk is encoded once. Several are encoded twice each, so randomness
    must depend on the chunk alone; memory holds all outputs and one chunk's activations. The
    gradients are exactly those of the full batch, in whose order `loss_fn` sees the outputs.

    `split` says which rows a chunk has; `group_size` rows share a BatchNorm. Raises InputError if B
    isn't divisible by `num_chunks` · `group_size`.
    """
    differentiate = jax.value_and_grad(loss_fn, argnums=(0, 1), has_aux=True)
    if num_chunks == 1:
        outputs, pull_back, statistics = jax.vjp(lambda p: encode(p, batch), params, has_aux=True)
        (loss, aux), (d_others, d_outputs) = differentiate(others, outputs)
        return Gradients(loss, aux, outputs, statistics, *pull_back(d_outputs), d_others)

    def join(x: Array) -> Array:
        return rearrange(x, "N (Q G) ... -> (Q N G) ...", G=group_size)

    size = len(jax.tree.leaves(batch)[0])
    if size % (num_chunks * group_size):
        raise InputError(
            f"A batch of {size} does not divide into {num_chunks} chunks of groups of {group_size} "
            "rows; change the batch size or the number of chunks."
        )
    of_chunks = functools.partial(split, num_chunks=num_chunks, group_size=group_size)
    chunks = jax.tree.map(of_chunks, batch)

    _, (outputs, statistics) = lax.scan(
        lambda _, chunk: (None, encode(params, chunk)), None, chunks
    )
    outputs = jax.tree.map(join, outputs)
    (loss, aux), (d_others, d_outputs) = differentiate(others, outputs)

    def add(grads: Any, inputs: Any) -> tuple[Any, None]:
        chunk, d_chunk = inputs
        _, pull_back = jax.vjp(lambda p: encode(p, chunk)[0], params)
        return jax.tree.map(jnp.add, grads, *pull_back(d_chunk)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    grads, _ = lax.scan(add, zeros, (chunks, jax.tree.map(of_chunks, d_outputs)))
    statistics = jax.tree.map(lambda x: x.mean(0), statistics)
    return Gradients(loss, aux, outputs, statistics, grads, d_others)


def split(x: Shaped[Array, "B ..."], num_chunks: int, group_size: int = 1) -> Array:
    """Split rows into chunks [`num_chunks`, B / `num_chunks`, ...].

    A chunk takes every `num_chunks`-th run of `group_size` rows. With B sharded contiguously and
    `num_chunks` · `group_size` a divisor of the rows per device, every device keeps its own rows.
    """
    return rearrange(x, "(Q N G) ... -> N (Q G) ...", N=num_chunks, G=group_size)
