"""Attention backends: several implementations of one function of queries, keys and values."""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from clip_jax import chips
from clip_jax.errors import InputError

Backend = Literal["auto", "xla", "short", "splash", "cudnn"]
# Queries, keys and values: [B, L, S·N·K], the output of the projection's matmul, or [B, L, S, N, K]
# where heads are sharded over devices. Attention returns [B, L, N·K] or [B, L, N, K].
QKV = Float[Array, "B L *SNK"]
# KV cache: keys and values of T tokens.
KV = tuple[Float[Array, "B N T K"], Float[Array, "B N T K"]]
Lengths = Int[Array, " B"] | None  # real tokens of each row, padding follows; None: all
Mask = Bool[Array, "B L"] | Bool[Array, "B L L"]  # of keys, or of queries and keys
Keys = Mask | Lengths  # tokens that are attended to


class Rotation(NamedTuple):
    """Rotary positions of L tokens (RoFormer, arXiv:2104.09864): each pair of channels of a query
    or key is turned by an angle. Sines have the sign − in a pair's first channel."""

    cos: Float[Array, "*B L K"]
    sin: Float[Array, "*B L K"]


_EARLY_VMEM = 16 << 20  # bytes in a core of TPUs that the table of chips leaves out
_LANES = 128  # of a TPU's vector unit; splash needs head dims and lengths in multiples of it
SPLASH_LENGTH = 577  # tokens; from here on splash reads less memory than XLA
_BLOCK = 512  # most tokens in a block of splash


def choose(device: Any, length: int, heads: int, dim: int, dtype: DTypeLike) -> Backend:
    """Return the backend that `auto` selects on a device that holds `heads` heads of each row.

    TPUs: `short`, compiled for v5e but not run, moves 50 GB of HBM in a step of ViT-B/16 where
    XLA's attention moves 118, and 137 instead of 429 for ViT-L/14.
    All lengths of NaFlex models use `short`, of So400m on v5p and 7x up to 784 patches. If VMEM is
    too small for a sequence, splash is faster than XLA from about 577 tokens. GPUs of compute
    capability 8.0 or later: cuDNN's kernel, which does not store the scores; compiled for H100 but
    not run.
    """
    platform = getattr(device, "platform", "cpu")  # a mesh of plain numbers, for planning, has none
    if platform == "tpu":
        from clip_jax.models.short_attention import MAX_LENGTH, vmem_bytes  # imports Pallas

        size = vmem_bytes(length, heads, dim, jnp.dtype(dtype).itemsize, vmem(device))
        fits = length <= MAX_LENGTH and size <= vmem(device)
        if fits and dim % 8 == 0 and dim >= 64:  # true of every published model
            return "short"
        return "splash" if length >= SPLASH_LENGTH else "xla"
    is_new = (
        platform == "gpu" and float(getattr(device, "compute_capability", 8)) >= 8
    )  # an abstract device has none
    if is_new and jnp.dtype(dtype).itemsize == 2 and dim % 8 == 0 and dim <= 128:
        return "cudnn"
    return "xla"


def vmem(device: Any) -> int:
    """Return the bytes of VMEM of a core; a device that interprets kernels has none to fill."""
    from clip_jax.models.short_attention import VMEM

    if getattr(device, "platform", "cpu") != "tpu":
        return VMEM
    chip = chips.find(device.device_kind)
    return _EARLY_VMEM if chip is None or chip.vmem_bytes is None else chip.vmem_bytes


def check_short(device: Any, length: int, heads: int, dim: int, dtype: DTypeLike) -> None:
    """Raise InputError if a TPU has less VMEM than `short` needs."""
    from clip_jax.models.short_attention import vmem_bytes

    size = vmem_bytes(length, heads, dim, jnp.dtype(dtype).itemsize, vmem(device))
    if getattr(device, "platform", "cpu") == "tpu" and size > vmem(device):
        raise InputError(
            f"model.attention='short' needs {size >> 20} MiB of VMEM for {length} tokens of "
            f"{heads} heads of {dim} channels, but {device.device_kind} has {vmem(device) >> 20}; "
            "set --model.attention auto."
        )


def xla(
    qkv: QKV,
    heads: int,
    causal: bool = False,
    lengths: Lengths = None,
    keys: Mask | None = None,
) -> Float[Array, "B L *NK"]:
    """Compute attention by XLA, on any device; with `causal` tokens do not attend to later ones.

    As in every backend, the output for tokens past `lengths` is undefined. `keys` masks the tokens
    that are attended to, at any positions.
    """
    q, k, v = split_heads(qkv, heads)
    mask = None if keys is None else _of_heads(keys)
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, key_value_seq_lengths=lengths
    )
    return _like(out, qkv)


def _of_heads(mask: Mask) -> Bool[Array, "B 1 #L L"]:
    """Return a mask with axes for heads and queries."""
    return mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]


def rotate(qkv: QKV, heads: int, rotation: Rotation, distance: int = 1) -> QKV:
    """Turn queries and keys by their tokens' angles.

    The channels of a pair have a distance of 1, or of half a head's channels.

    All of `qkv` is one elementwise operation, for values by the angle 0: half of the memory traffic
    of slicing them apart, and of joining them for the kernels.
    """

    def of_heads(table: Float[Array, "*B L K"], of_values: float) -> Array:
        parts = jnp.stack([table, table, jnp.full_like(table, of_values)], -2)[..., None, :]
        parts = jnp.broadcast_to(parts, (*parts.shape[:-2], heads, table.shape[-1]))
        return parts if qkv.ndim == 5 else parts.reshape(*table.shape[:-1], -1)

    return _turn(qkv, of_heads(rotation.cos, 1), of_heads(rotation.sin, 0), distance)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _turn(x: Array, cos: Array, sin: Array, distance: int) -> Array:
    # Pairs are exchanged before the cast: float32 values would be stored for it.
    other = _swap(x, distance).astype(jnp.float32)
    return (x.astype(jnp.float32) * cos + other * sin).astype(x.dtype)


def _swap(x: Float[Array, "*B C"], distance: int) -> Float[Array, "*B C"]:
    """Exchange the channels of each pair; by shifts, which a TPU computes within one fusion."""

    def shifted(by: int) -> Array:
        padding = [(0, 0, 0)] * (x.ndim - 1) + [(by, -by, 0)]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), padding)

    is_first = jnp.arange(x.shape[-1]) // distance % 2 == 0
    return jnp.where(is_first, shifted(-distance), shifted(distance))


_turn.defvjp(
    lambda x, cos, sin, distance: (_turn(x, cos, sin, distance), (cos, sin)),
    # Back by the same angles.
    lambda distance, tables, dy: (_turn(dy, tables[0], -tables[1], distance), None, None),
)


def cached(
    qkv: QKV, heads: int, cache: KV, position: Int[Array, ""]
) -> tuple[Float[Array, "B L *NK"], KV]:
    """Compute attention of one token to itself and to the cached tokens before it.

    Returns also the cache, with the token's key and value written at `position`.
    """
    q, *new = split_heads(qkv, heads)
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(
            old, x.swapaxes(1, 2).astype(old.dtype), position, axis=2
        )
        for old, x in zip(cache, new, strict=True)
    )
    out = to_cached(q, (keys, values), jnp.arange(keys.shape[2]) <= position)
    return _like(out, qkv), (keys, values)


def to_cached(
    q: Float[Array, "B L N K"], kv: KV, seen: Bool[Array, "... T"] | None = None
) -> Float[Array, "B L N K"]:
    """Compute attention to keys and values in the layout of the cache: one matrix per head.
    `seen` masks keys, [T] or [B, 1, 1, T].

    `dot_product_attention` would transpose the whole cache for every new token.
    """
    keys, values = kv
    scores = jnp.einsum("BLNK,BNTK->BNLT", q, keys, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if seen is not None:
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("BNLT,BNTK->BLNK", jax.nn.softmax(scores).astype(q.dtype), values)


def weights(
    q: Float[Array, "B L N K"], k: Float[Array, "B T N K"], keys: Keys = None
) -> Float[Array, "B L T"]:
    """Return the attention weights, the mean over heads, in float32.

    To look at: the backends above never store them. `keys` are those that are attended to.
    """
    scores = jnp.einsum("BLNK,BTNK->BNLT", q, k, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if keys is not None:
        seen = keys if keys.ndim > 1 else jnp.arange(k.shape[1]) < keys[:, None]
        scores = jnp.where(_of_heads(seen), scores, jnp.finfo(scores.dtype).min)
    return jax.nn.softmax(scores).mean(1)


def cudnn(
    qkv: QKV, heads: int, causal: bool = False, lengths: Lengths = None
) -> Float[Array, "B L *NK"]:
    """Compute attention by cuDNN's fused kernel, without storing [L, L] scores.

    For GPUs of compute capability 8.0 or later, in 16 bits. An odd length is padded by one token,
    which is masked: JAX's gradient of the kernel supports even lengths only.
    """
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        raise InputError(
            f"model.attention='cudnn' supports 16-bit types only, not {qkv.dtype}; "
            "set --model.dtype bfloat16 or --model.attention xla."
        )
    batch, length = qkv.shape[:2]
    if length % 2:
        qkv = jnp.pad(qkv, ((0, 0), (0, 1), *((0, 0),) * (qkv.ndim - 2)))
        if lengths is None and not causal:  # causal masks the added token, too
            lengths = jnp.full(batch, length, jnp.int32)
    q, k, v = split_heads(qkv, heads)
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return _like(out, qkv)[:, :length]


def splash(
    qkv: QKV, heads: int, causal: bool = False, lengths: Lengths = None, *, interpret: bool = False
) -> Float[Array, "B L *NK"]:
    """Compute attention by JAX's TPU kernel, for sequences too long for `short`.

    It stores no [L, L] scores. Arrays are those of one device: the compiler cannot shard a kernel
    (`sharding.layout` does). `interpret` runs it slowly on a CPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    parts = split_heads(qkv, heads)
    batch, length, _, dim = parts[0].shape
    padded = -(-length // _LANES) * _LANES
    block = max(size for size in range(_LANES, _BLOCK + 1, _LANES) if padded % size == 0)
    pad = ((0, 0), (0, 0), (0, padded - length), (0, -dim % _LANES))
    q, k, v = (jnp.pad(x.swapaxes(1, 2), pad) for x in parts)
    shape = (padded, padded)
    of_head = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([of_head] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        interpret=interpret,
    )
    if lengths is None:
        lengths = jnp.full(batch, length, jnp.int32)
    # Padding is a segment of its own, so real tokens do not attend to it.
    real = (jnp.arange(padded) < lengths[:, None]).astype(jnp.int32)
    out = jax.vmap(kernel)(q * dim**-0.5, k, v, kernels.SegmentIds(real, real))
    return _like(out[:, :, :length, :dim].swapaxes(1, 2), qkv)


def split_heads(qkv: QKV, heads: int) -> list[Float[Array, "B L N K"]]:
    """Return queries, keys and values."""
    split = qkv.reshape(*qkv.shape[:2], 3, heads, -1)
    return [split[:, :, third] for third in range(3)]


def _like(out: Float[Array, "B L N K"], qkv: QKV) -> Float[Array, "B L *NK"]:
    """Merge the heads' channels into one axis if those of `qkv` are merged."""
    return out if qkv.ndim == 5 else out.reshape(*out.shape[:2], -1)
