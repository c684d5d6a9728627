"""Attention over short sequences on TPU: a Pallas kernel that holds a whole sequence in VMEM.

It reads the fused projection in the matmul's layout and writes the layout that the output
projection reads. Scores never reach HBM; only queries, keys and values are saved for the gradient.
"""

import functools
import math
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

MAX_LENGTH = 1024  # tokens
VMEM = 128 << 20  # bytes; of a v5e or v6e

_LANES = 128  # lanes of a vector register
_ROWS = 8  # rows per program: the sublanes of a register
_ROOM = 64 << 20  # most bytes of VMEM for eight rows; with more, single rows are faster
_HIDDEN = -1e30  # score of a masked key
_FEW = 8  # most queries past full registers that do not fill one of their own
_TOGETHER = 640_000  # most scores of one head each of what a loop's iteration computes

Lengths = Int[Array, " B"] | None  # real tokens of each row; None: all
Product = Callable[[Array, Array, int, int], Array]  # see `_dot`
Split = Callable[
    [Callable[..., Array], int], Callable[..., Array]
]  # of a kernel and its output's rank
Part = tuple[int, int] | None  # the lanes of one of several heads
# Queries, keys, values and, for gradients, the output's gradient; and the number of real tokens.
Row = tuple[Sequence[Float[Array, "L W"]], Int[Array, ""] | None]
# The transpose of the tokens in full registers, and the other tokens.
Output = tuple[Float[Array, "W T"], Float[Array, "R W"] | None]


def vmem_bytes(length: int, heads: int, dim: int, itemsize: int = 2, room: int = VMEM) -> int:
    """Estimate the VMEM in bytes of the backward pass, which needs more than the forward pass."""
    return _vmem(length, heads, dim, itemsize, _is_by_token(length, heads, dim, itemsize, room))


def _vmem(length: int, heads: int, dim: int, itemsize: int, is_by_token: bool) -> int:
    width, scores = _up(heads * dim, _LANES), _up(length, 16) * _up(length, _LANES) * 4
    if is_by_token:
        tokens = length * _ROWS * itemsize
        blocks = tokens * (2 * (4 * _LANES + 3 * width) + 7 * _LANES)  # double buffering, scratch
    else:
        # Double buffering, and the transposes and results of all heads of a group but one.
        blocks = 2 * _up(length, 16) * 7 * width * itemsize
        blocks += _up(length, 16) * (_group(length, heads, dim) - dim) * 3 * (itemsize + 4)
    return blocks + 8 * scores + (4 << 20)


def _is_by_token(length: int, heads: int, dim: int, itemsize: int, room: int) -> bool:
    """Return whether heads fill registers, and VMEM is sufficient for eight rows at a time."""
    return _fills_registers(heads, dim) and _vmem(length, heads, dim, itemsize, True) <= min(
        room, _ROOM
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5, 6))
def short(
    qkv: Float[Array, "B L *SNK"],
    lengths: Lengths,
    heads: int,
    causal: bool,
    split: Split,
    interpret: bool,
    room: int = VMEM,
) -> Float[Array, "B L *NK"]:
    """Compute attention with `heads` heads per device; `split` maps a kernel over the devices.

    The channels of qkv are one axis, the projection's matmul's output, or three; the output has the
    same form. Output past a row's length is undefined. `room` is the size of VMEM in bytes.
    `split` is applied to the forward and the backward kernel separately, so that no custom gradient
    is inside a map over devices.
    """
    return _short_forward(qkv, lengths, heads, causal, split, interpret, room)[0]


def _short_forward(
    qkv: Array, lengths: Lengths, heads: int, causal: bool, split: Split, interpret: bool, room: int
) -> tuple[Array, tuple[Array, Lengths]]:
    call = functools.partial(_call, _forward, heads, causal, interpret, room)
    ndim = {3: 3, 5: 4}[qkv.ndim]
    return split(call, ndim)(qkv, *_known(lengths)), (qkv, lengths)


def _short_backward(
    heads: int,
    causal: bool,
    split: Split,
    interpret: bool,
    room: int,
    residuals: tuple[Array, Lengths],
    gradient: Array,
) -> tuple[Array, None]:
    qkv, lengths = residuals
    call = functools.partial(_call, _backward, heads, causal, interpret, room)
    return split(call, qkv.ndim)(qkv, gradient, *_known(lengths)), None


short.defvjp(_short_forward, _short_backward)


def _known(lengths: Lengths) -> tuple[Array, ...]:
    return () if lengths is None else (lengths,)


def _call(
    kernel: Callable, heads: int, causal: bool, interpret: bool, room: int, qkv: Array, *rest: Array
) -> Array:
    """Run a kernel over the arrays of one device: qkv, and in `rest` gradients and lengths."""
    batch, length = qkv.shape[:2]
    lengths = [x for x in rest if x.ndim == 1]
    wide = [x.reshape(*x.shape[:2], math.prod(x.shape[2:])) for x in (qkv, *rest) if x.ndim > 1]
    width = wide[0].shape[2] // 3
    dim, backward = width // heads, len(wide) > 1
    run = _by_token if _is_by_token(length, heads, dim, qkv.dtype.itemsize, room) else _by_row
    products = 5 if backward else 2  # of matrices [L, K], each of 2 L² K operations per head
    out_width = 3 * width if backward else width
    product = functools.partial(_dot, exact=interpret)
    result = (
        jnp.zeros((0, length, out_width), qkv.dtype)
        if not batch
        else run(
            functools.partial(kernel, dim=dim, causal=causal, product=product),
            lengths,
            wide,
            out_width,
            heads,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=vmem_bytes(length, heads, dim, qkv.dtype.itemsize, room),
            ),
            cost_estimate=pl.CostEstimate(
                flops=products * 2 * batch * length * length * width,
                bytes_accessed=sum(x.size for x in wide) * qkv.dtype.itemsize
                + batch * length * out_width * qkv.dtype.itemsize,
                transcendentals=batch * heads * length * length,
            ),
            interpret=interpret,
            name="short_attention" + ("_backward" if backward else "_forward"),
        )
    )
    if backward:
        return result.reshape(qkv.shape)
    return result if qkv.ndim == 3 else result.reshape(batch, length, heads, dim)


def _fills_registers(heads: int, dim: int) -> bool:
    return _LANES % dim == 0 and heads * dim % _LANES == 0


def _group(length: int, heads: int, dim: int) -> int:
    """Return the channels of the fewest heads that fill registers, or of all heads; of one if they
    share registers and the sequence is long."""
    if not _fills_registers(heads, dim) and length**2 > _TOGETHER:
        return dim
    size = math.lcm(dim, _LANES)
    return size if heads * dim % size == 0 else heads * dim


def _by_token(
    kernel: Callable,
    lengths: list[Array],
    wide: list[Array],
    out_width: int,
    heads: int,
    **options: Any,
) -> Array:
    """Run over [L, B, W], XLA's layout of such arrays: a register holds one token of eight rows.

    A program computes 128 channels of eight rows. Numbers of 16 bits are packed in pairs of rows,
    so the tokens of two rows are read at a stride as words of 32 bits.
    """
    batch, length, width3 = wide[0].shape
    dtype, groups = wide[0].dtype, width3 // 3 // _LANES
    packed = 4 // dtype.itemsize  # rows in a word
    rows = min(_up(batch, packed), _ROWS)
    more, words = -batch % rows, rows // packed
    lengths = [jnp.pad(x, (0, more)) for x in lengths]
    wide = [jnp.pad(x.swapaxes(0, 1), ((0, 0), (0, more), (0, 0))) for x in wide]
    inputs, outputs = 2 + len(wide), out_width * 3 // width3
    together = _together(length, packed, words)

    def body(*refs: Any) -> None:
        refs, scratch = refs[: -inputs - outputs], refs[-inputs - outputs :]
        *in_refs, out_ref = refs
        ins, first = in_refs[len(lengths) :], pl.program_id(0) * rows
        for ref, spread in zip(ins, scratch[:inputs], strict=True):
            spread[...] = pltpu.bitcast(ref[...].reshape(length * rows, _LANES), jnp.int32)

        def compute(turn: Any, _: Any) -> Any:
            at = [turn * together + i for i in range(together)]
            pending: list[Row] = []
            for i in at:
                read = [x[pl.ds(i, length, stride=words), :] for x in scratch[:inputs]]
                for j, values in enumerate(zip(*(_unpack(x, dtype) for x in read), strict=True)):
                    pending.append(
                        (values, in_refs[0][first + i * packed + j] if lengths else None)
                    )
            results = kernel(pending)
            for n, i in enumerate(at):
                unpacked = zip(*results[n * packed : (n + 1) * packed], strict=True)
                for spread, x in zip(scratch[inputs:], unpacked, strict=True):
                    tiled, rest = zip(*x, strict=True)
                    count = tiled[0].shape[1]
                    spread[pl.ds(i, count, stride=words), :] = _pack(tiled, dtype).T
                    if count < length:
                        after = pl.ds(count * words + i, length - count, stride=words)
                        spread[after, :] = _pack(rest, dtype)
            return 0

        jax.lax.fori_loop(0, words // together, compute, 0)
        for third, spread in enumerate(scratch[inputs:]):
            at = pl.multiple_of((third * groups + pl.program_id(1)) * _LANES, _LANES)
            block = pltpu.bitcast(spread[...], dtype).reshape(length, rows, _LANES)
            out_ref[:, :, pl.ds(at, _LANES)] = block

    def read(third: int) -> pl.BlockSpec:  # q, k and v are `groups` blocks apart
        return pl.BlockSpec((length, rows, _LANES), lambda i, g: (0, i, third * groups + g))

    result = pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((length, batch + more, out_width), dtype),
        grid=((batch + more) // rows, groups),
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * len(lengths)
        + [read(third) for third in (0, 1, 2, 0)[:inputs]],
        # All channels: the gradients of q, k and v are far apart. Written after the last group.
        out_specs=pl.BlockSpec((length, rows, out_width), lambda i, g: (0, i, 0)),
        scratch_shapes=[pltpu.VMEM((length * words, _LANES), jnp.int32)] * (inputs + outputs),
        **options,
    )(*lengths, wide[0], wide[0], *wide)
    return result.swapaxes(0, 1)[:batch]


def _unpack(words: Int[Array, "L W"], dtype: Any) -> list[Array]:
    if dtype.itemsize == 4:
        return [jax.lax.bitcast_convert_type(words, dtype)]
    halves = words.astype(jnp.int16), (words >> 16).astype(jnp.int16)
    return [jax.lax.bitcast_convert_type(x, dtype) for x in halves]


def _pack(rows: Sequence[Array], dtype: Any) -> Int[Array, "L W"]:
    if dtype.itemsize == 4:
        return jax.lax.bitcast_convert_type(rows[0], jnp.int32)
    low, high = (
        jax.lax.bitcast_convert_type(x.astype(dtype), jnp.int16).astype(jnp.int32) for x in rows
    )
    return low & 0xFFFF | high << 16


def _by_row(
    kernel: Callable,
    lengths: list[Array],
    wide: list[Array],
    out_width: int,
    heads: int,
    **options: Any,
) -> Array:
    """Run over [B, L, W], all heads of one row at a time; heads may have any size.

    Heads that fill registers are computed in a loop, which compiles in a fraction of the time.
    """
    batch, length, width3 = wide[0].shape
    width = width3 // 3
    dim = width // heads

    def body(*refs: Any) -> None:
        *in_refs, out_ref = refs
        qkv_ref, *more = in_refs[len(lengths) :]
        real = in_refs[0][pl.program_id(0)] if lengths else None

        def compute(first: Any, size: int) -> None:
            lanes = [pl.ds(n * width + first, size) for n in range(3)]
            read = [qkv_ref[0, :, x] for x in lanes] + [ref[0, :, lanes[0]] for ref in more]
            [result] = kernel([(read, real)])
            for out_lanes, (tiled, rest) in zip(lanes, result, strict=False):
                count = tiled.shape[1]
                out_ref[0, :count, out_lanes] = tiled.astype(out_ref.dtype).T
                if rest is not None:
                    out_ref[0, count:, out_lanes] = rest.astype(out_ref.dtype)

        def register(i: Any, _: Any) -> Any:
            compute(pl.multiple_of(i * _LANES, _LANES), _LANES)
            return 0

        if _fills_registers(heads, dim):
            jax.lax.fori_loop(0, width // _LANES, register, 0)
        else:
            size = _group(length, heads, dim)
            for first in range(0, width, size):
                compute(first, size)

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


def _together(length: int, rows: int, units: int) -> int:
    """Return how many words of rows to compute at once: more would not fit into VMEM."""
    fitting = [n for n in (1, 2, 4) if units % n == 0 and n * rows * length**2 <= _TOGETHER]
    return max(fitting, default=1)


def _up(size: int, to: int) -> int:
    return -(-size // to) * to


def _tiled(length: int) -> int:
    """Return the number of queries that are lanes; the few that follow, of all heads, are rows."""
    few = length % _LANES
    return length - few if few <= _FEW and length > _LANES else length


def _staggered(
    rows: Sequence[Row], heads: Sequence[Part], last: Callable, head: Callable
) -> list[tuple[Any, list[Any]]]:
    """Take the queries of each head through three steps, each a step behind those before.

    The compiler mostly keeps the order of the operations, so one head's products are computed in
    the matrix unit while the vector unit computes another's softmax. Returns for each row the
    results of the few last queries and of each head.
    """
    length = rows[0][0][0].shape[0]
    units = [last(i) for i in range(len(rows)) if _tiled(length) < length]
    first = len(units)
    units += [head(i, n) for i in range(len(rows)) for n in range(len(heads))]
    results: list[Any] = [None] * len(units)
    for newest in range(len(units) + 2):
        for i in range(newest, newest - 3, -1):
            if 0 <= i < len(units):
                results[i] = next(units[i])
    starts = enumerate(range(first, len(units), len(heads)))
    return [(results[i] if first else None, results[at : at + len(heads)]) for i, at in starts]


def _forward(
    rows: Sequence[Row], *, dim: int, causal: bool, product: Product
) -> list[list[Output]]:
    """Compute attention of adjacent heads.

    The products of weights are transposed: the matrix unit then takes the weights as they are, and
    as many steps as a head has channels.
    """
    heads, tiled = _heads(rows[0][0][0], dim), _tiled(rows[0][0][0].shape[0])
    turned = [v.T for (_, _, v), _ in rows]

    def last(row: int) -> Generator:
        (q, k, v), real = rows[row]
        scores = product(_stack(q[tiled:], heads), k, 1, 1)
        yield
        e, total = _softmax(scores, dim, causal, real, 1)
        yield
        yield _unstack(product(e.astype(v.dtype), v, 1, 0) * (1 / total), heads)

    def head(row: int, n: int) -> Generator:
        (q, k, v), real = rows[row]
        scores = product(_near(k, heads[n]), _only_near(q[:tiled], heads[n]), 1, 1)
        yield
        e, total = _softmax(scores, dim, causal, real, 0)
        yield
        vt = _rows(turned[row], heads[n])
        out = product(vt[:, :tiled], e[:tiled].astype(v.dtype), 1, 0)
        yield (out + _outer(vt[:, tiled:], e[tiled:])) * (1 / total)

    parts = _staggered(rows, heads, last, head)
    return [[(jnp.concatenate(outs), rest)] for rest, outs in parts]


def _backward(
    rows: Sequence[Row], *, dim: int, causal: bool, product: Product
) -> list[list[Output]]:
    """Compute the gradients of q, k and v from the output's."""
    heads, tiled = _heads(rows[0][0][0], dim), _tiled(rows[0][0][0].shape[0])
    few = rows[0][0][0].shape[0] - tiled
    scale = dim**-0.5  # applied to the gradients of q and k, which are smaller than those of scores
    turned = [[x.T for x in (q, k, do)] for (q, k, _, do), _ in rows]
    of_last: list[Any] = [None] * len(rows)

    def last(row: int) -> Generator:
        (q, k, v, do), real = rows[row]
        q_few, do_few = _stack(q[tiled:], heads), _stack(do[tiled:], heads)
        scores, dweights = product(q_few, k, 1, 1), product(do_few, v, 1, 1)
        yield
        dscores, weights = of_last[row] = _dsoftmax(scores, dweights, dim, causal, real, 1)
        yield
        ds, w = dscores.astype(q.dtype), weights[:, tiled:].astype(q.dtype)
        dq = _unstack(product(ds, k, 1, 0), heads)
        yield [dq, product(ds[:, tiled:], q_few, 0, 0), product(w, do_few, 0, 0)]

    def head(row: int, n: int) -> Generator:
        (q, k, v, do), real = rows[row]
        scores = product(_near(k, heads[n]), _only_near(q[:tiled], heads[n]), 1, 1)
        dweights = product(_near(v, heads[n]), _only_near(do[:tiled], heads[n]), 1, 1)
        yield
        dscores, weights = _dsoftmax(scores, dweights, dim, causal, real, 0)
        ds, w = dscores.astype(q.dtype), weights.astype(q.dtype)
        yield
        qt, kt, dot = (_rows(x, heads[n]) for x in turned[row])
        dq = product(kt[:, :tiled], ds[:tiled], 1, 0) + _outer(kt[:, tiled:], dscores[tiled:])
        dk = product(qt[:, :tiled], ds[:tiled], 1, 1)
        dv = product(dot[:, :tiled], w[:tiled], 1, 1)
        if few:
            by_few = [x[n * few : (n + 1) * few, :tiled] for x in of_last[row]]
            dk += _outer(qt[:, tiled:], by_few[0])
            dv += _outer(dot[:, tiled:], by_few[1])
        yield dq * scale, dk * scale, dv, ds[tiled:], w[tiled:]

    results: list[list[Output]] = []
    parts = _staggered(rows, heads, last, head)
    for ((q, _, _, do), _), (rests, of_heads) in zip(rows, parts, strict=True):
        *outs, ds, w = map(list, zip(*of_heads, strict=True))
        if few:
            rests[1] += _unstack(product(jnp.concatenate(ds), q[:tiled], 1, 0), heads)
            rests[2] += _unstack(product(jnp.concatenate(w), do[:tiled], 1, 0), heads)
            rests[:2] = [x * scale for x in rests[:2]]
        results.append(list(zip(map(jnp.concatenate, outs), rests or [None] * 3, strict=True)))
    return results


def _outer(columns: Float[Array, "K R"], rows: Float[Array, "R L"]) -> Array:
    """Multiply matrices with a few columns and rows, in the vector unit."""
    wide = columns.astype(jnp.float32)
    return sum((wide[:, i : i + 1] * rows[i : i + 1] for i in range(len(rows))), jnp.float32(0))


def _heads(x: Array, dim: int) -> list[Part]:
    """List the lanes of each head in [L, W]; None: there is only one head.

    A product with the other heads' lanes set to zero takes the matrix unit no longer than a narrow
    one, and no lanes have to be shifted.
    """
    width = x.shape[1]
    return [None] if width == dim else [(at, at + dim) for at in range(0, width, dim)]


def _only(x: Array, head: Part) -> Array:
    """Set the lanes of other heads to zero."""
    if head is None:
        return x
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where((lane >= head[0]) & (lane < head[1]), x, jnp.zeros((), x.dtype))


def _near(x: Float[Array, "L W"], head: Part) -> Array:
    """Return the registers that have lanes of a head."""
    return x if head is None else x[:, head[0] // _LANES * _LANES : _up(head[1], _LANES)]


def _only_near(x: Float[Array, "L W"], head: Part) -> Array:
    """Return the registers that have lanes of a head, with the lanes of others set to zero."""
    if head is None:
        return x
    before = head[0] // _LANES * _LANES
    return _only(_near(x, head), (head[0] - before, head[1] - before))


def _rows(x: Float[Array, "W L"], head: Part) -> Float[Array, "K L"]:
    return x if head is None else x[slice(*head)]


def _stack(x: Float[Array, "R W"], heads: list[Part]) -> Float[Array, "N_R W"]:
    """Repeat a few rows for each head, with its own lanes."""
    return jnp.concatenate([_only(x, head) for head in heads])


def _unstack(x: Float[Array, "N_R W"], heads: list[Part]) -> Float[Array, "R W"]:
    """Combine the lanes that each head's rows have for itself."""
    parts = jnp.split(x, len(heads))
    return sum((_only(y, head) for y, head in zip(parts, heads, strict=True)), jnp.float32(0))


def _softmax(
    scores: Array, dim: int, causal: bool, real: Array | None, axis: int
) -> tuple[Array, Array]:
    """Return the exponentials of scores in float32, and their sums over the keys, along `axis`."""
    key = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
    if causal:
        query = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1 - axis)
        if axis == 1:
            tiled = _tiled(scores.shape[1])
            query = tiled + query % (scores.shape[1] - tiled)
        scores = jnp.where(key <= query, scores, _HIDDEN)
    if real is not None:
        scores = jnp.where(key < real, scores, _HIDDEN)
    scale = dim**-0.5 * math.log2(math.e)  # one product for the scale and the base; `exp` has two
    e = jnp.exp2((scores - scores.max(axis, keepdims=True)) * scale)
    return e, e.sum(axis, keepdims=True)


def _dsoftmax(
    scores: Array, dweights: Array, dim: int, causal: bool, real: Array | None, axis: int
) -> tuple[Array, Array]:
    """Return the gradient of the scaled scores, and their softmax."""
    e, total = _softmax(scores, dim, causal, real, axis)
    weights = e * (1 / total)
    inner = (weights * dweights).sum(axis, keepdims=True)
    return weights * (dweights - inner), weights


def _dot(a: Array, b: Array, axis: int, other: int, exact: bool = False) -> Array:
    """Multiply matrices, contracting one axis of each, in float32.

    `exact` converts first, for CPUs: with jax 0.12 they lack some products of 16 bits.
    """
    if exact:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((axis,), (other,)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
