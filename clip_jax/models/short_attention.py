"""Attention over short sequences on TPU: a Pallas kernel that holds a whole sequence in VMEM.

It reads the fused projection in the matmul's layout and writes the layout that the output
projection reads. Scores never reach HBM; only queries, keys and values are saved for the gradient.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

MAX_LENGTH = 1024  # tokens

_LANES = 128  # lanes of a vector register
_ROWS = 8  # rows per program: the sublanes of a register
_ROOM = 64 << 20  # most bytes of VMEM for eight rows; with more, single rows are faster
_HIDDEN = -1e30  # score of a masked key

Lengths = Int[Array, " B"] | None  # real tokens of each row; None: all
Split = Callable[
    [Callable[..., Array], int], Callable[..., Array]
]  # of a kernel and its output's rank


def vmem_bytes(length: int, heads: int, dim: int, itemsize: int = 2) -> int:
    """Estimate the VMEM in bytes of the backward pass, which needs more than the forward pass."""
    return _vmem(length, heads * dim, itemsize, _is_by_token(length, heads, dim, itemsize))


def _vmem(length: int, width: int, itemsize: int, is_by_token: bool) -> int:
    width, scores = _up(width, _LANES), _up(length, 16) * _up(length, _LANES) * 4
    if is_by_token:
        tokens = length * _ROWS
        blocks, spread = tokens * (4 * _LANES + 3 * width) * itemsize, 7 * tokens * _LANES * 4
    else:
        blocks, spread = _up(length, 16) * 7 * width * itemsize, 0
    return 2 * blocks + spread + 8 * scores + (4 << 20)  # double buffering


def _is_by_token(length: int, heads: int, dim: int, itemsize: int) -> bool:
    """Return whether heads fill registers, and VMEM is sufficient for eight rows at a time."""
    return _fills_registers(heads, dim) and _vmem(length, heads * dim, itemsize, True) <= _ROOM


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def short(
    qkv: Float[Array, "B L *SNK"], lengths: Lengths, heads: int, causal: bool, split: Split,
    interpret: bool,
) -> Float[Array, "B L *NK"]:  # fmt: skip
    """Compute attention with `heads` heads per device; `split` maps a kernel over the devices.

    The channels of qkv are one axis, the projection's matmul's output, or three; the output has the
    same form. Output past a row's length is undefined. `split` is applied to the forward and the
    backward kernel separately, so that no custom gradient is inside a map over devices.
    """
    return _short_forward(qkv, lengths, heads, causal, split, interpret)[0]


def _short_forward(
    qkv: Array, lengths: Lengths, heads: int, causal: bool, split: Split, interpret: bool
) -> tuple[Array, tuple[Array, Lengths]]:
    call = functools.partial(_call, _forward, heads=heads, causal=causal, interpret=interpret)
    ndim = {3: 3, 5: 4}[qkv.ndim]
    return split(call, ndim)(qkv, *_known(lengths)), (qkv, lengths)


def _short_backward(
    heads: int, causal: bool, split: Split, interpret: bool, kept: tuple[Array, Lengths],
    gradient: Array,
) -> tuple[Array, None]:  # fmt: skip
    qkv, lengths = kept
    call = functools.partial(_call, _backward, heads=heads, causal=causal, interpret=interpret)
    return split(call, qkv.ndim)(qkv, gradient, *_known(lengths)), None


short.defvjp(_short_forward, _short_backward)


def _known(lengths: Lengths) -> tuple[Array, ...]:
    return () if lengths is None else (lengths,)


def _call(
    kernel: Callable, qkv: Array, *rest: Array, heads: int, causal: bool, interpret: bool
) -> Array:
    """Run a kernel over the arrays of one device: qkv, and in `rest` gradients and lengths."""
    batch, length = qkv.shape[:2]
    lengths = [x for x in rest if x.ndim == 1]
    wide = [x.reshape(batch, length, -1) for x in (qkv, *rest) if x.ndim > 1]
    width = wide[0].shape[2] // 3
    dim, backward = width // heads, len(wide) > 1
    run = _by_token if _is_by_token(length, heads, dim, qkv.dtype.itemsize) else _by_row
    products = 5 if backward else 2  # of matrices [L, K], each of 2 L² K operations per head
    out_width = 3 * width if backward else width
    result = run(
        functools.partial(kernel, dim=dim), lengths, wide, out_width, heads, causal,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=vmem_bytes(length, heads, dim, qkv.dtype.itemsize),
        ),
        cost_estimate=pl.CostEstimate(
            flops=products * 2 * batch * length * length * width,
            bytes_accessed=sum(x.size for x in wide) * qkv.dtype.itemsize
            + batch * length * out_width * qkv.dtype.itemsize,
            transcendentals=batch * heads * length * length,
        ),
        interpret=interpret,
        name="short_attention" + ("_backward" if backward else "_forward"),
    )  # fmt: skip
    if backward:
        return result.reshape(qkv.shape)
    return result if qkv.ndim == 3 else result.reshape(batch, length, heads, dim)


def _fills_registers(heads: int, dim: int) -> bool:
    return _LANES % dim == 0 and heads * dim % _LANES == 0


def _by_token(
    kernel: Callable, lengths: list[Array], wide: list[Array], out_width: int, heads: int,
    causal: bool, **options: Any,
) -> Array:  # fmt: skip
    """Run over [L, B, W], XLA's layout of such arrays: a register holds one token of eight rows.

    A program computes 128 channels of eight rows. It converts its input to float32, so that the
    tokens of one row can be read at a stride; 16-bit numbers are packed in pairs of rows.
    """
    batch, length, width3 = wide[0].shape
    rows, groups = min(batch, _ROWS), width3 // 3 // _LANES
    more = -batch % rows
    lengths = [jnp.pad(x, (0, more)) for x in lengths]
    wide = [jnp.pad(x.swapaxes(0, 1), ((0, 0), (0, more), (0, 0))) for x in wide]
    inputs, outputs = 2 + len(wide), out_width * 3 // width3

    def body(*refs: Any) -> None:
        refs, scratch = refs[: -inputs - outputs], refs[-inputs - outputs :]
        *known, out_ref = refs
        ins, first = known[len(lengths) :], pl.program_id(0) * rows
        for ref, spread in zip(ins, scratch[:inputs], strict=True):
            spread[...] = ref[...].astype(jnp.float32).reshape(spread.shape)

        def row(i: Any, _: Any) -> Any:
            seen = _seen(length, causal, *(ref[first + i] for ref in known[: len(lengths)]))
            at = pl.ds(i, length, stride=rows)
            values = [x[at, :].astype(out_ref.dtype) for x in scratch[:inputs]]
            for spread, x in zip(scratch[inputs:], kernel(*values, seen=seen), strict=True):
                spread[at, :] = x
            return 0

        jax.lax.fori_loop(0, rows, row, 0, unroll=_unrolled(length, rows))
        for third, spread in enumerate(scratch[inputs:]):
            at = pl.multiple_of((third * groups + pl.program_id(1)) * _LANES, _LANES)
            block = spread[...].reshape(length, rows, _LANES)
            out_ref[:, :, pl.ds(at, _LANES)] = block.astype(out_ref.dtype)

    def read(third: int) -> pl.BlockSpec:  # q, k and v are `groups` blocks apart
        return pl.BlockSpec((length, rows, _LANES), lambda i, g: (0, i, third * groups + g))

    result = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((length, batch + more, out_width), wide[0].dtype),
        grid=((batch + more) // rows, groups),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(lengths)
        + [read(third) for third in (0, 1, 2, 0)[:inputs]],
        # All channels: the gradients of q, k and v are far apart. Written after the last group.
        out_specs=pl.BlockSpec((length, rows, out_width), lambda i, g: (0, i, 0)),
        scratch_shapes=[pltpu.VMEM((length * rows, _LANES), jnp.float32)] * (inputs + outputs),
        **options,
    )(*lengths, wide[0], wide[0], *wide)
    return result.swapaxes(0, 1)[:batch]


def _by_row(
    kernel: Callable, lengths: list[Array], wide: list[Array], out_width: int, heads: int,
    causal: bool, **options: Any,
) -> Array:  # fmt: skip
    """Run over [B, L, W], all heads of one row at a time; heads may have any size.

    Heads that fill registers are computed in a loop, which compiles in a fraction of the time.
    """
    batch, length, width3 = wide[0].shape
    width = width3 // 3
    dim = width // heads

    def body(*refs: Any) -> None:
        *known, out_ref = refs
        qkv_ref, *rest = known[len(lengths) :]
        row = pl.program_id(0)
        seen = _seen(length, causal, *(ref[row] for ref in known[: len(lengths)]))

        def compute(first: Any, size: int) -> None:
            at = [pl.ds(third * width + first, size) for third in range(3)]
            values = [qkv_ref[0, :, x] for x in at] + [ref[0, :, at[0]] for ref in rest]
            for lanes, x in zip(at, kernel(*values, seen=seen), strict=False):
                out_ref[0, :, lanes] = x.astype(out_ref.dtype)

        def register(i: Any, _: Any) -> Any:
            compute(pl.multiple_of(i * _LANES, _LANES), _LANES)
            return 0

        if _fills_registers(heads, dim):
            jax.lax.fori_loop(0, width // _LANES, register, 0)
        else:
            for head in range(heads):
                compute(head * dim, dim)

    def block(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, length, size), lambda i, _: (i, 0, 0))

    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((batch, length, out_width), wide[0].dtype),
        grid=(batch, 1),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(lengths)
        + [block(x.shape[2]) for x in wide],
        out_specs=block(out_width),
        **options,
    )(*lengths, *wide)


def _unrolled(length: int, rows: int) -> int:
    """Return the rows per loop iteration: too few scores would leave the matrix unit idle."""
    fitting = [n for n in (1, 2, 4, 8) if rows % n == 0 and n * length * length <= 160_000]
    return max(fitting, default=1)


def _up(size: int, to: int) -> int:
    return -(-size // to) * to


def _forward(q: Array, k: Array, v: Array, *, dim: int, seen: Array | None) -> list[Array]:
    """Compute attention of adjacent heads in [L, W]."""
    parts, heads = [], _heads(q, dim)
    for own in heads:
        weights = _weights(_only(q, own), k, dim, seen)
        parts.append(_dot(weights.astype(v.dtype), v, 0, 0))
    return [_join(parts, heads)]


def _backward(
    q: Array, k: Array, v: Array, do: Array, *, dim: int, seen: Array | None
) -> list[Array]:
    """Compute the gradients of q, k and v from the output's."""
    parts, heads = [], _heads(q, dim)
    for own in heads:
        weights = _weights(_only(q, own), k, dim, seen)
        dweights = _dot(v, _only(do, own), 1, 1)
        inner = (weights * dweights).sum(0, keepdims=True)
        dscores = (weights * (dweights - inner) * dim**-0.5).astype(q.dtype)
        # Of all orders, the compiler's schedule of this one keeps the matrix unit busiest.
        dv, dk = _dot(weights.astype(do.dtype), do, 1, 0), _dot(dscores, q, 1, 0)
        parts.append((_dot(dscores, k, 0, 0), dk, dv))
    return [_join(x, heads) for x in zip(*parts, strict=True)]


def _heads(x: Array, dim: int) -> list[tuple[int, int] | None]:
    """List the lanes of each head in [L, W]; None: there is only one head.

    A product with the other heads' lanes set to zero takes the matrix unit no longer than a narrow
    one, and no lanes have to be shifted.
    """
    width = x.shape[1]
    return [None] if width == dim else [(at, at + dim) for at in range(0, width, dim)]


def _only(x: Array, own: tuple[int, int] | None, others: Array | float = 0) -> Array:
    """Keep a head's own lanes and replace the others."""
    if own is None:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= own[0]) & (lane < own[1]), x, jnp.asarray(others, x.dtype))


def _join(parts: Sequence[Array], heads: list[tuple[int, int] | None]) -> Array:
    """Combine the lanes that each head's product has for itself."""
    out, *rest = parts
    for x, own in zip(rest, heads[1:], strict=True):
        out = _only(x, own, out)
    return out


def _seen(length: int, causal: bool, real: Array | None = None) -> Bool[Array, "K Q"] | None:
    """Return the mask of keys that each query attends to; None: all."""
    shape = (length, length)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    seen = key <= jax.lax.broadcasted_iota(jnp.int32, shape, 1) if causal else None
    if real is None:
        return seen
    return key < real if seen is None else seen & (key < real)


def _weights(q: Array, k: Array, dim: int, seen: Array | None) -> Float[Array, "K Q"]:
    """Return the softmax of one head's scores in float32; keys first, so sums are over rows."""
    scores = _dot(k, q, 1, 1)
    if seen is not None:
        scores = jnp.where(seen, scores, _HIDDEN)
    weights = jnp.exp((scores - scores.max(0, keepdims=True)) * dim**-0.5)
    return weights * (1 / weights.sum(0, keepdims=True))


def _dot(a: Array, b: Array, axis: int, other: int) -> Array:
    """Multiply matrices, contracting one axis of each, in float32."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a, b, (((axis,), (other,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
