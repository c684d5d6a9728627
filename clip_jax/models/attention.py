"""Attention by backend: one function of queries, keys and values, computed in several ways."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from clip_jax.errors import InputError
from clip_jax.models.short_attention import MAX_LENGTH, vmem_bytes

Backend = Literal["auto", "xla", "short", "splash", "cudnn"]
# Queries, keys and values: [B, L, S·N·K], as the projection's matmul leaves them, or, where heads
# lie on several devices, [B, L, S, N, K]. Attention makes of them [B, L, N·K] or [B, L, N, K].
QKV = Float[Array, "B L *SNK"]
# Keys and values of T tokens, kept for those that follow.
KV = tuple[Float[Array, "B N T K"], Float[Array, "B N T K"]]
Lengths = Int[Array, " B"] | None  # real tokens of each row, the others behind them; None: all

# Of one core, by JAX's name of the chip; earlier ones have 16.
VMEM_MIB = {
    "TPU v5 lite": 128, "TPU v5e": 128, "TPU v6 lite": 128, "TPU v6e": 128,
    "TPU v5": 64, "TPU v5p": 64, "TPU7x": 64,
}  # fmt: skip
_LANES = 128  # of a TPU's vector unit: splash takes head dims and lengths in multiples of it
SPLASH_LENGTH = 577  # tokens from which splash reads less of memory than XLA
_BLOCK = 512  # tokens of a splash block at most


def choose(device: Any, length: int, heads: int, dim: int, dtype: DTypeLike) -> Backend:
    """Choose what `auto` is on a device of the mesh, which holds that many heads of each row.

    TPUs: with `short`, compiled for v5e and not run, a step of ViT-B/16 moves 50 GB of HBM where it
    moved 118 with XLA's attention, of ViT-L/14 137 where it moved 429; on v5p the compiler's
    estimate for ViT-H/14, whose heads of 80 fill no register, is 1.2 s where that for MetaCLIP 2's
    same towers was 2.3. BENCHMARKS.md has more. Where VMEM is too small for a sequence, splash is
    ahead of XLA from about 577 tokens. GPUs from generation 8.0: cuDNN's kernel, which holds no
    scores; compiled for H100, not run.
    """
    platform = getattr(device, "platform", "cpu")  # None: a mesh of numbers, on which nothing runs
    if platform == "tpu":
        room = VMEM_MIB.get(device.device_kind, 16) * 2**20
        fits = length <= MAX_LENGTH and vmem_bytes(length, heads, dim) <= room
        if fits and dim % 8 == 0 and dim >= 64:  # of every published model
            return "short"
        return "splash" if length >= SPLASH_LENGTH else "xla"
    is_new = platform == "gpu" and float(device.compute_capability) >= 8
    if is_new and jnp.dtype(dtype).itemsize == 2 and dim % 8 == 0 and dim <= 128:
        return "cudnn"
    return "xla"


def xla(
    qkv: QKV,
    heads: int,
    causal: bool = False,
    lengths: Lengths = None,
    keys: Bool[Array, "B L"] | None = None,
) -> Float[Array, "B L *NK"]:
    """Leave it to XLA, on any device. With `causal` a token sees none behind it.

    Here as in every backend, rows of tokens past `lengths` are undefined. `keys` names the tokens
    that are seen, wherever they stand.
    """
    q, k, v = _parts(qkv, heads)
    mask = None if keys is None else keys[:, None, None, :]
    out = jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, key_value_seq_lengths=lengths
    )
    return _like(out, qkv)


def cached(
    qkv: QKV, heads: int, cache: KV, position: Int[Array, ""]
) -> tuple[Float[Array, "B L *NK"], KV]:
    """Let one token see itself and those before it, whose keys and values are cached.

    Its own are put into the cache at `position`, and the cache is returned.
    """
    q, *new = _parts(qkv, heads)
    keys, values = (
        jax.lax.dynamic_update_slice_in_dim(
            old, x.swapaxes(1, 2).astype(old.dtype), position, axis=2
        )
        for old, x in zip(cache, new, strict=True)
    )
    out = kept(q, (keys, values), jnp.arange(keys.shape[2]) <= position)
    return _like(out, qkv), (keys, values)


def kept(
    q: Float[Array, "B L N K"], kv: KV, seen: Bool[Array, " T"] | None = None
) -> Float[Array, "B L N K"]:
    """Attend to keys and values as a cache lays them out: each head's are one matrix.

    As tokens come, one by one, nothing is moved but what a product reads; `dot_product_attention`
    turns all of them about for every token.
    """
    keys, values = kv
    scores = jnp.einsum("BLNK,BNTK->BNLT", q, keys, preferred_element_type=jnp.float32)
    scores = scores * q.shape[-1] ** -0.5
    if seen is not None:
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("BNLT,BNTK->BLNK", jax.nn.softmax(scores).astype(q.dtype), values)


def cudnn(
    qkv: QKV, heads: int, causal: bool = False, lengths: Lengths = None
) -> Float[Array, "B L *NK"]:
    """NVIDIA's fused kernel, which holds no [L, L]: GPUs of the 8.0 generation on, bfloat16.

    An odd length gets one token more, which none of the real ones sees: JAX's training takes even
    ones alone.
    """
    if qkv.dtype not in (jnp.bfloat16, jnp.float16):
        raise InputError(
            f"model.attention='cudnn' computes in 16 bits, not in {qkv.dtype}; "
            "set --model.dtype bfloat16 or --model.attention xla."
        )
    batch, length = qkv.shape[:2]
    if length % 2:
        qkv = jnp.pad(qkv, ((0, 0), (0, 1), *((0, 0),) * (qkv.ndim - 2)))
        if lengths is None and not causal:  # causal: nothing sees the token behind the last
            lengths = jnp.full(batch, length, jnp.int32)
    q, k, v = _parts(qkv, heads)
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return _like(out, qkv)[:, :length]


def splash(
    qkv: QKV, heads: int, causal: bool = False, lengths: Lengths = None, *, interpret: bool = False
) -> Float[Array, "B L *NK"]:
    """JAX's kernel for TPU, which holds no [L, L]: for sequences that `short` cannot hold.

    Arrays of one device: the compiler cannot split a kernel (`sharding.layout` does). `interpret`
    runs it slowly on a CPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    parts = _parts(qkv, heads)
    batch, length, _, dim = parts[0].shape
    padded = -(-length // _LANES) * _LANES
    block = max(size for size in range(_LANES, _BLOCK + 1, _LANES) if padded % size == 0)
    pad = ((0, 0), (0, 0), (0, padded - length), (0, -dim % _LANES))
    q, k, v = (jnp.pad(x.swapaxes(1, 2), pad) for x in parts)
    shape = (padded, padded)
    of_head = masks.CausalMask(shape) if causal else masks.FullMask(shape)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([of_head] * heads), head_shards=1, q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
            block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        ),
        interpret=interpret,
    )  # fmt: skip
    if lengths is None:
        lengths = jnp.full(batch, length, jnp.int32)
    # Padding is a segment of its own: no real token sees it.
    real = (jnp.arange(padded) < lengths[:, None]).astype(jnp.int32)
    out = jax.vmap(kernel)(q * dim**-0.5, k, v, kernels.SegmentIds(real, real))
    return _like(out[:, :, :length, :dim].swapaxes(1, 2), qkv)


def _parts(qkv: QKV, heads: int) -> list[Float[Array, "B L N K"]]:
    split = qkv.reshape(*qkv.shape[:2], 3, heads, -1)
    return [split[:, :, third] for third in range(3)]


def _like(out: Float[Array, "B L N K"], qkv: QKV) -> Float[Array, "B L *NK"]:
    """Put the heads' channels in one axis if they came so."""
    return out if qkv.ndim == 5 else out.reshape(*out.shape[:2], -1)
