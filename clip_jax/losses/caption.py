"""The caption loss: cross-entropy of each token given the image and those before it.

The vocabulary is large, so its logits are never stored for all positions: both passes compute them
for some positions at a time.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from clip_jax.errors import check_ranges
from clip_jax.losses.objective import AnyMesh, Axes, Context, Outputs, Result, Term
from clip_jax.models.clip import CLIP
from clip_jax.models.decoder import IGNORED


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(Term):
    """Caption loss (CoCa, MaMMUT): cross-entropy of the tokens that the decoder predicts."""

    name: ClassVar[str] = "caption"
    uses_embeddings: ClassVar[bool] = False

    weight: float = 2.0  # Factor on this loss in the objective (CoCa: 2, MaMMUT: 1).
    chunk_size: int = 2_048  # Token positions per device whose logits are in memory at once.

    def __post_init__(self) -> None:
        check_ranges(self, "CaptionConfig.", weight="[0, inf)", chunk_size="[1, inf)")

    @property
    def needs(self) -> tuple[str, ...]:
        """The decoder's states."""
        return ("caption_states",)

    def encode(self, x: Context) -> Outputs:
        """Return the loss of each row, summed over its tokens."""
        rows = caption_loss(
            x.outputs["caption_states"],
            x.params["decoder"]["vocab_projection"],
            labels_of(x.model, x.inputs["text"]),
            bias=x.params["decoder"].get("vocab_bias"),
            mesh=x.mesh,
            axes=x.axes,
            pad_id=IGNORED,
            chunk_size=self.chunk_size,
        )
        return {"rows": rows}

    def loss(self, x: Context) -> Result:
        """Average over the tokens of the global batch."""
        labels = labels_of(x.model, x.inputs["text"])
        return x.outputs["rows"].sum() / count_labels(labels, IGNORED), {}


def labels_of(model: CLIP, tokens: Int[Array, "B L"]) -> Int[Array, "B l"]:
    """Return the tokens that the decoder predicts; IGNORED for padding."""
    return model.needs_decoder().labels(model.config.text, tokens)


def caption_loss(
    states: Float[Array, "B L D"],
    kernel: Float[Array, "D V"],
    labels: Int[Array, "B L"],
    *,
    pad_id: int,
    chunk_size: int,
    bias: Float[Array, " V"] | None = None,
    mesh: AnyMesh | None = None,
    axes: Axes | None = None,
) -> Float[Array, " B"]:
    """Return each row's Σ −log p(label) over the positions whose label is no padding.

    p is the softmax of `states · kernel + bias`, in float32; matmuls are in the states' dtype. On a
    mesh rows are sharded over `axes.rows`, and the kernel like its parameter. With a custom
    derivative, memory is that of the logits of `chunk_size` positions and of one kernel.
    """
    options = {"pad_id": pad_id, "chunk": chunk_size}
    if mesh is None or axes is None:
        forward = functools.partial(_forward, vocabulary=None, **options)
        backward = functools.partial(_backward, vocabulary=None, **options)
    else:
        width, vocabulary = axes.width, axes.vocabulary
        others = tuple(axis for axis in axes.rows if axis != width)

        def gathered(kernel: Array, states: Array) -> Array:
            return lax.all_gather(kernel.astype(states.dtype), width, axis=0, tiled=True)

        def local_forward(states: Array, kernel: Array, *more: Any) -> Any:
            return _forward(
                states, gathered(kernel, states), *more, vocabulary=vocabulary, **options
            )

        def local_backward(states: Array, kernel: Array, *more: Any) -> Any:
            d_states, d_kernel, d_bias = _backward(
                states, gathered(kernel, states), *more, vocabulary=vocabulary, **options
            )
            d_kernel = lax.psum_scatter(lax.psum(d_kernel, others), width, tiled=True)
            return d_states, d_kernel, jax.tree.map(lambda x: lax.psum(x, axes.rows), d_bias)

        rows, table, words = P(axes.rows), P(width, vocabulary), P(vocabulary)
        shard = functools.partial(jax.shard_map, mesh=mesh, check_vma=False)
        inputs = (rows, table, words, rows)
        # As in `streamed`, the custom derivative is outside the shard_map.
        forward = jax.jit(shard(local_forward, in_specs=inputs, out_specs=(rows, rows)))
        backward = jax.jit(
            shard(local_backward, in_specs=(*inputs, rows, rows), out_specs=(rows, table, words))
        )

    @jax.custom_vjp
    def loss(states: Array, kernel: Array, bias: Array | None, labels: Array) -> Array:
        return forward(states, kernel, bias, labels)[0]

    def loss_fwd(
        states: Array, kernel: Array, bias: Array | None, labels: Array
    ) -> tuple[Array, Any]:
        value, normalizer = forward(states, kernel, bias, labels)
        return value, (states, kernel, bias, labels, normalizer)

    def loss_bwd(residuals: Any, cotangent: Array) -> tuple[Any, ...]:
        return *backward(*residuals, cotangent), None  # integers have no gradient

    loss.defvjp(loss_fwd, loss_bwd)
    return loss(states, kernel, bias, labels)


def count_labels(labels: Int[Array, "B L"], pad_id: int) -> Float[Array, ""]:
    """Return the number of positions that the loss is averaged over, at least 1."""
    return jnp.maximum((labels != pad_id).sum(), 1).astype(jnp.float32)


def _forward(
    states: Float[Array, "B L D"],
    kernel: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    labels: Int[Array, "B L"],
    *,
    vocabulary: str | None,
    pad_id: int,
    chunk: int,
) -> tuple[Float[Array, " B"], Float[Array, "B L"]]:
    """Return each row's loss and each position's log Σ exp.

    `vocabulary` is the mesh axis that shards the vocabulary, None if none does.
    """
    kernel = kernel.astype(states.dtype)

    def visit(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        states, labels = chunk
        logits = _logits(states, kernel, bias)
        top = logits.max(-1) if vocabulary is None else lax.pmax(logits.max(-1), vocabulary)
        total = jnp.exp(logits - top[:, None]).sum(-1)
        label = jnp.where(_is_label(labels, logits.shape[1], vocabulary), logits, 0).sum(-1)
        if vocabulary is not None:
            total, label = lax.psum((total, label), vocabulary)
        normalizer = top + jnp.log(total)
        return None, (normalizer - label, normalizer)

    _, (losses, normalizer) = _by_chunks(visit, None, (states, labels), chunk, pad_id)
    return jnp.where(labels != pad_id, losses, 0).sum(1), normalizer


def _backward(
    states: Float[Array, "B L D"],
    kernel: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    labels: Int[Array, "B L"],
    normalizer: Float[Array, "B L"],
    d_rows: Float[Array, " B"],
    *,
    vocabulary: str | None,
    pad_id: int,
    chunk: int,
) -> tuple[Float[Array, "B L D"], Float[Array, "D V"], Float[Array, " V"] | None]:
    weights = jnp.where(labels != pad_id, d_rows[:, None], 0)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (kernel, bias))
    kernel = kernel.astype(states.dtype)

    def visit(
        sums: tuple[Array, Array | None], chunk: tuple[Array, ...]
    ) -> tuple[tuple[Array, Array | None], Array]:
        d_kernel, d_bias = sums
        states, labels, normalizer, weights = chunk
        logits = _logits(states, kernel, bias)
        d_logits = jnp.exp(logits - normalizer[:, None])
        d_logits -= _is_label(labels, logits.shape[1], vocabulary)
        d_logits = d_logits * weights[:, None]
        if d_bias is not None:
            d_bias += d_logits.sum(0)
        d_logits = d_logits.astype(states.dtype)
        d_kernel += product("ND,NV->DV", states, d_logits)
        d_states = product("NV,DV->ND", d_logits, kernel)
        if vocabulary is not None:
            d_states = lax.psum(d_states, vocabulary)
        return (d_kernel, d_bias), d_states.astype(states.dtype)

    chunks = (states, labels, normalizer, weights)
    (d_kernel, d_bias), d_states = _by_chunks(visit, zeros, chunks, chunk, pad_id)
    return d_states, d_kernel, d_bias


def _logits(
    states: Float[Array, "N D"], kernel: Float[Array, "D V"], bias: Float[Array, " V"] | None
) -> Float[Array, "N V"]:
    logits = product("ND,DV->NV", states, kernel)
    return logits if bias is None else logits + bias


def product(equation: str, a: Array, b: Array) -> Array:
    """Multiply in the arguments' type, with sums in float32."""
    return jnp.einsum(equation, a, b, precision="highest", preferred_element_type=jnp.float32)


def _is_label(labels: Int[Array, " N"], count: int, vocabulary: str | None) -> Bool[Array, "N V"]:
    first = 0 if vocabulary is None else lax.axis_index(vocabulary) * count
    return labels[:, None] == first + jnp.arange(count)


def _by_chunks(
    visit: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    arrays: tuple[Array, ...],
    size: int,
    pad_id: int,
) -> tuple[Any, Any]:
    """Scan over arrays [B, L, ...], `size` positions at a time; the last chunk is padded."""
    batch, length = arrays[0].shape[:2]
    count = batch * length
    size = min(size, count)
    missing = -count % size

    def split(x: Array) -> Array:
        fill = pad_id if jnp.issubdtype(x.dtype, jnp.integer) else 0
        x = x.reshape(count, *x.shape[2:])
        x = jnp.pad(x, ((0, missing), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
        return x.reshape(-1, size, *x.shape[1:])

    def join(x: Array) -> Array:
        return x.reshape(-1, *x.shape[2:])[:count].reshape(batch, length, *x.shape[2:])

    carry, rows = lax.scan(visit, carry, jax.tree.map(split, arrays))
    return carry, jax.tree.map(join, rows)
