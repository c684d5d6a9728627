"""Attention by backend: one function of queries, keys and values, computed in three ways."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Backend = Literal["xla", "cudnn", "splash"]
Mask = Bool[Array, "L L"] | None  # None: every token sees every token; else the causal one

_LANES = 128  # of a TPU's vector unit: splash takes head dims and lengths in multiples of it
_BLOCK = 512  # tokens of a splash block at most


def xla(
    q: Float[Array, "B L N K"], k: Float[Array, "B L N K"], v: Float[Array, "B L N K"], mask: Mask
) -> Float[Array, "B L N K"]:
    """Leave it to XLA, on any device: the least memory traffic up to about 77 tokens."""
    return jax.nn.dot_product_attention(q, k, v, mask=None if mask is None else mask[None, None])


def cudnn(
    q: Float[Array, "B L N K"], k: Float[Array, "B L N K"], v: Float[Array, "B L N K"], mask: Mask
) -> Float[Array, "B L N K"]:
    """NVIDIA's fused kernel, which holds no [L, L]: GPUs of the 8.0 generation on, bfloat16."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"model.attention='cudnn' computes in 16 bits, not in {q.dtype}; "
            "set --model.dtype bfloat16 or --model.attention xla."
        )
    return jax.nn.dot_product_attention(q, k, v, is_causal=mask is not None, implementation="cudnn")


def splash(
    q: Float[Array, "B L N K"], k: Float[Array, "B L N K"], v: Float[Array, "B L N K"], mask: Mask,
    *, interpret: bool = False,
) -> Float[Array, "B L N K"]:  # fmt: skip
    """TPU's kernel, which holds no [L, L]: ahead of XLA from about 577 tokens on.

    Arrays of one device: the compiler cannot split a kernel (`sharding.layout` does). `interpret`
    runs it slowly on a CPU.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, heads, dim = q.shape
    padded = -(-length // _LANES) * _LANES
    block = max(size for size in range(_LANES, _BLOCK + 1, _LANES) if padded % size == 0)
    pad = ((0, 0), (0, 0), (0, padded - length), (0, -dim % _LANES))
    q, k, v = (jnp.pad(x.swapaxes(1, 2), pad) for x in (q * dim**-0.5, k, v))
    shape = (padded, padded)
    of_head = masks.FullMask(shape) if mask is None else masks.CausalMask(shape)
    kernel = kernels.make_splash_mha(
        mask=masks.MultiHeadMask([of_head] * heads), head_shards=1, q_seq_shards=1,
        block_sizes=kernels.BlockSizes(
            block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block,
            block_kv_dkv=block, block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
        ),
        interpret=interpret,
    )  # fmt: skip
    real = np.arange(padded) < length  # padding is a segment of its own: no real token sees it
    segments = kernels.SegmentIds(*(jnp.asarray(real, jnp.int32),) * 2)
    out = jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)
    return out[:, :, :length, :dim].swapaxes(1, 2)
