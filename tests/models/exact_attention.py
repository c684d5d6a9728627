"""Attention and its gradient in float64, and how far a backend is from them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from clip_jax.models.short_attention import VMEM, short


def exact(qkv: np.ndarray, weight: np.ndarray, causal: bool, lengths: Any) -> list[np.ndarray]:
    """Output and gradient in float64, by the formulas."""
    q, k, v = np.moveaxis(qkv, 2, 0)
    length, scale = qkv.shape[1], qkv.shape[-1] ** -0.5
    scores = np.einsum("BQNK,BLNK->BNQL", q, k) * scale
    if causal:
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    if lengths is not None:
        real = np.arange(length) < np.asarray(lengths)[:, None]
        scores = np.where(real[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out = np.einsum("BNQL,BLNK->BQNK", p, v)
    dp = np.einsum("BQNK,BLNK->BNQL", weight, v)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * scale
    dq, dk = np.einsum("BNQL,BLNK->BQNK", ds, k), np.einsum("BNQL,BQNK->BLNK", ds, q)
    return [out, np.stack([dq, dk, np.einsum("BNQL,BQNK->BLNK", p, weight)], 2)]


@functools.partial(jax.jit, static_argnums=(0, 3))
def both(attend: Callable, qkv: Any, weight: Any, causal: bool, lengths: Any) -> Any:
    """Output and gradient of an attention, which gets its channels in one axis."""
    batch, length, _, heads, _ = qkv.shape
    flat = qkv.reshape(batch, length, -1)
    out, back = jax.vjp(lambda qkv: attend(qkv, heads, causal, lengths), flat)
    gradient = back(weight.reshape(out.shape))[0]
    return out.reshape(weight.shape), gradient.reshape(qkv.shape)


def interpreted(qkv: Any, heads: int, causal: bool, lengths: Any, room: int = VMEM) -> Any:
    """The short kernel, interpreted, without a mesh."""
    return short(qkv, lengths, heads, causal, lambda kernel, _: kernel, True, room)


@jax.custom_vjp
def rounded_back(x: Any) -> Any:
    """What is given, with a gradient that is rounded to bfloat16, whatever the compiler thinks."""
    return x


rounded_back.defvjp(
    lambda x: (x, None), lambda _, gradient: (jax.lax.reduce_precision(gradient, 8, 7),)
)


def xla_of_tpu(qkv: Any, heads: int, causal: bool, lengths: Any) -> Any:
    """XLA's attention in bfloat16, as it is computed on a TPU.

    There the weights' gradient is rounded to bfloat16 as the product leaves it, and the scores',
    which stays in float32, as an operand of products of default precision, by the matrix unit
    (tests/programs/test_tpu_compiler.py looks at both). A CPU rounds neither.
    """
    batch, length, width = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, heads, width // 3 // heads), 2, 0)
    scores = jnp.einsum("BQNK,BLNK->BNQL", q, k, preferred_element_type=jnp.float32)
    scores = rounded_back(scores) * q.shape[-1] ** -0.5
    if causal:
        scores = jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf)
    if lengths is not None:
        scores = jnp.where(jnp.arange(length) < lengths[:, None, None, None], scores, -jnp.inf)
    weights = rounded_back(jax.nn.softmax(scores)).astype(qkv.dtype)
    return jnp.einsum("BNQL,BLNK->BQNK", weights, v).reshape(batch, length, -1)


def errors(
    attend: Callable,
    length: int,
    heads: int,
    dim: int,
    causal: bool,
    lengths: Any = None,
    dtype: Any = jnp.float32,
    batch: int = 2,
) -> tuple[list[float], list[float]]:
    """Errors of output and gradient against float64, in the largest value: the largest one, and
    the root of the mean square. Rows of padding are left out."""
    rng = np.random.default_rng(0)
    shapes = (batch, length, 3, heads, dim), (batch, length, heads, dim)
    qkv, weight = (np.array(jnp.asarray(rng.standard_normal(x), dtype), np.float64) for x in shapes)
    is_padding = np.zeros((batch, length), bool)
    if lengths is not None:
        lengths = jnp.asarray(lengths, jnp.int32)
        is_padding = np.arange(length) >= np.asarray(lengths)[:, None]
        weight[is_padding] = 0
    expected = exact(qkv, weight, causal, lengths)
    arguments = jnp.asarray(qkv, dtype), jnp.asarray(weight, dtype), causal, lengths
    got = [np.array(x, np.float64) for x in both(attend, *arguments)]
    for x in (got[0], expected[0]):
        x[is_padding] = 0
    wrong = [np.abs(a - b) / np.abs(b).max() for a, b in zip(got, expected, strict=True)]
    return [x.max() for x in wrong], [np.sqrt((x**2).mean()) for x in wrong]


def check_padding(
    attend: Callable,
    shape: tuple[int, int, int],
    lengths: Any,
    bound: float,
    dtype: Any = jnp.float32,
) -> None:
    """Check that valid tokens agree with float64.

    What padding contains changes no bit of their output and gradient, and padding has a gradient of
    exactly zero.
    """
    length, heads, dim = shape
    most, _ = errors(attend, *shape, False, lengths, dtype, len(lengths))
    assert max(most) <= bound
    rng, lengths = np.random.default_rng(1), jnp.asarray(lengths, jnp.int32)
    is_valid = np.arange(length) < np.asarray(lengths)[:, None]
    qkv = rng.standard_normal((len(lengths), length, 3, heads, dim))
    weight = np.where(is_valid[:, :, None, None], rng.standard_normal(qkv[:, :, 0].shape), 0)
    other = np.where(is_valid[:, :, None, None, None], qkv, 100 * rng.standard_normal(qkv.shape))
    results = [
        [
            np.asarray(x)
            for x in both(
                attend, *(jnp.asarray(x, dtype) for x in (values, weight)), False, lengths
            )
        ]
        for values in (qkv, other)
    ]
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a[is_valid], b[is_valid])
    for _, gradient in results:
        assert gradient[is_valid].any()
        assert not gradient[~is_valid].any()
