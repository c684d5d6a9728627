"""Estimate the memory and the work of a traced program in seconds, without the compiler.

A trace has the shapes of all operations, and two rules stand in for the compiler's choices.
Elementwise operations are fused: their results are stored only if a loop or a kernel reads them.
An array is in memory from the operation that computes it to the last one that reads it.
Collectives, and padding to complete tiles, are left out.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from clip_jax import sharding
from clip_jax.pods.work import PASSES, Work

# Primitives that the compiler inlines, by the parameter that has their operations.
INLINED = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "remat2": "jaxpr",
    "checkpoint": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
    "shard_map": "jaxpr",
}  # fmt: skip
# Operations that change nothing, or the order of axes, which is a matter of layout.
VIEWS = {
    "reshape", "squeeze", "expand_dims", "transpose", "sharding_constraint", "reshard", "name",
    "reduce_precision", "pad", "stop_gradient", "optimization_barrier", "copy", "rev",
}  # fmt: skip
PRODUCTS = {"dot_general", "conv_general_dilated"}
# Operations that store their results, and read what is stored.
STORING = {
    *PRODUCTS, "scan", "while", "cond", "pallas_call", "gather", "scatter", "scatter-add", "sort",
    "dynamic_update_slice", "all_gather", "all_to_all", "ppermute", "psum", "psum_invariant",
    "reduce_scatter", "cumsum", "top_k",
}  # fmt: skip
REDUCTIONS = ("reduce_", "arg")  # fused with what they read, not with what reads them


@dataclass
class Operation:
    """One operation of a flat program; values are numbers."""

    equation: Any
    inputs: list[int]
    outputs: list[int]
    is_local: bool  # its shapes are those of one device

    @property
    def name(self) -> str:
        return self.equation.primitive.name


@dataclass
class Program:
    """A flat program: its operations, and the bytes of its values on one device."""

    operations: list[Operation] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    results: set[int] = field(default_factory=set)

    def add(self, size: int) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1


class Shares:
    """What one device holds of arrays whose shapes are global.

    Args:
      state: its shapes with shardings, of the parameters first.
      rows: number of rows of a batch; a chunk's, if the batch is computed in chunks.
      mesh: of the devices.
    """

    def __init__(self, state: Any, rows: int, mesh: sharding.AnyMesh) -> None:
        self._known: dict[tuple[int, ...], float] = {}
        for x in jax.tree.leaves(state):
            share = math.prod(x.sharding.shard_shape(x.shape)) / max(math.prod(x.shape), 1)
            for shape in (x.shape, x.shape[1:]):  # of a stack of layers, and of one layer
                self._known.setdefault(shape, share)
        self._rows, self._shards = rows, sharding.batch_shards(mesh)
        self._devices = math.prod(mesh.shape.values())

    def has_rows(self, shape: tuple[int, ...]) -> bool:
        """Return whether an array has rows of the batch, as its first axis or after the layers'."""
        of_batch = (size and size % self._rows == 0 for size in shape[:2])
        return shape not in self._known and any(of_batch)

    def held(self, shape: tuple[int, ...]) -> float:
        """Return the share that a device holds: of a parameter's shape as that is sharded, of an
        array with rows as these are, although `tensor` may split it further; all of another."""
        if shape in self._known:
            return self._known[shape]
        return 1 / self._shards if self.has_rows(shape) else 1.0

    def computed(self, *shapes: tuple[int, ...]) -> float:
        """Return the share of a product of arrays of these shapes that a device computes."""
        if any(map(self.has_rows, shapes)):
            return 1 / self._devices
        return min(map(self.held, shapes))


def flatten(jaxpr: core.Jaxpr, shares: Shares, is_local: bool = False) -> Program:
    """List the operations of a traced program, without the calls that the compiler inlines."""
    program = Program()

    def size_of(aval: Any, is_local: bool) -> int:
        shape = getattr(aval, "shape", ())
        bits = getattr(getattr(aval, "dtype", None), "itemsize", 0) * math.prod(shape)
        return int(bits * (1 if is_local else shares.held(shape)))

    def inline(jaxpr: core.Jaxpr, inputs: Sequence[int], is_local: bool) -> list[int]:
        numbers: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))

        def number(x: Any) -> int:
            if isinstance(x, core.Literal):
                return program.add(0)
            if x not in numbers:
                numbers[x] = program.add(size_of(x.aval, is_local))
            return numbers[x]

        for equation in jaxpr.eqns:
            arguments = [number(x) for x in equation.invars]
            name = equation.primitive.name
            inner = equation.params.get(INLINED.get(name, ""))
            if inner is None and name in VIEWS and _is_view(equation):
                numbers |= zip(equation.outvars, arguments, strict=False)
                continue
            if inner is None:
                outputs = [number(x) for x in equation.outvars]
                program.operations.append(Operation(equation, arguments, outputs, is_local))
                continue
            results = inline(_open(inner), arguments, is_local or name == "shard_map")
            numbers |= zip(equation.outvars, results, strict=True)
        return [number(x) for x in jaxpr.outvars]

    inputs = [program.add(size_of(x.aval, is_local)) for x in jaxpr.invars]
    program.results = set(inline(jaxpr, inputs, is_local))
    return program


def _is_view(equation: Any) -> bool:
    """Return whether the results have as many elements as the first arguments."""
    pairs = zip(equation.invars, equation.outvars, strict=False)
    return all(math.prod(x.aval.shape) == math.prod(y.aval.shape) for x, y in pairs)


def _open(jaxpr: Any) -> core.Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)


@dataclass(frozen=True)
class Reader:
    """Reads the memory of traced programs, and collects the work of one device.

    `fast` is the size of arrays, in bytes, that stay on the chip between two operations.
    """

    shares: Shares
    fast: float
    works: list[Work] = field(default_factory=list)

    def read(self, traced: Any, *, updates: bool = False) -> int:
        """Return the peak memory in bytes of what `jax.jit(...).trace` returned.

        With `updates`, its arguments and results are not counted: it updates the former in place.
        """
        return self._peak(flatten(traced.jaxpr.jaxpr, self.shares), updates=updates)

    def _peak(self, program: Program, times: int = 1, *, updates: bool = False) -> int:
        produced = {value for x in program.operations for value in x.outputs}
        inputs = set(range(len(program.sizes))) - produced
        outside = inputs | program.results
        stored = inputs | _stored(program)
        counted = stored - outside if updates else stored
        sources = _sources(program, stored)
        ends: dict[int, list[int]] = {}
        for value, end in _last_reads(program, stored).items():
            ends.setdefault(end, []).append(value)
        live = sum(program.sizes[value] for value in inputs & counted)
        peak, shared = live, set()
        for i, x in enumerate(program.operations):
            live += sum(program.sizes[value] for value in x.outputs if value in counted)
            inside = [
                self._peak(flatten(inner, self.shares, x.is_local), times * repeated)
                for inner, repeated in _inner(x)
            ]
            peak = max(peak, live + max(inside, default=0))
            written = stored.intersection(x.outputs)
            if not inside and (written or x.name in PRODUCTS):
                read = set().union(*(sources[value] for value in x.inputs))
                if x.name not in STORING:  # the compiler fuses operations that read the same
                    read -= shared
                    shared |= read | written
                moved = [
                    program.sizes[value]
                    for value in read | written
                    if value in outside or program.sizes[value] > self.fast
                ]
                self.works.append(self._work(x, times, sum(moved)))
            live -= sum(program.sizes[value] for value in ends.get(i, ()) if value in counted)
        return peak

    def _work(self, x: Operation, times: int, moved: int) -> Work:
        flops, part = 0.0, "elementwise"
        if x.name in PRODUCTS:
            part = "matmuls"
            flops = product(x.equation)
            if not x.is_local:
                operands = (*x.equation.invars, *x.equation.outvars)
                flops *= self.shares.computed(*(operand.aval.shape for operand in operands))
        elif x.name == "pallas_call":
            part, cost = "kernels", x.equation.params["cost_estimate"]
            if cost is not None:
                flops, moved = cost.flops, cost.bytes_accessed
            else:
                grid = math.prod(x.equation.params["grid_mapping"].grid)
                flops = grid * products(_open(x.equation.params["jaxpr"]))
        return Work(
            name=x.name,
            opcode=x.name,
            part=part,
            times=times,
            flops=flops,
            bytes=moved,
            cycles=None,
        )


def _stored(program: Program) -> set[int]:
    """Return the computed values that are stored; the others are fused with their readers."""
    readers: dict[int, set[str]] = {}
    for x in program.operations:
        for value in x.inputs:
            readers.setdefault(value, set()).add(x.name)
    stored = set()
    for x in program.operations:
        # A product's result may be the input of an epilogue; what a product reads can be fused.
        always = x.name.startswith(REDUCTIONS) or (x.name in STORING and x.name not in PRODUCTS)
        for value in x.outputs:
            is_read = readers.get(value, set()) & (STORING - PRODUCTS)
            if always or is_read or value in program.results:
                stored.add(value)
    return stored


def _last_reads(program: Program, stored: set[int]) -> dict[int, int]:
    """Return the operation that last reads each value, itself or what is fused with it."""
    last: dict[int, int] = {}
    for i, x in reversed([*enumerate(program.operations)]):
        end = max([i, *(last.get(value, i) for value in x.outputs if value not in stored)])
        for value in x.inputs:
            last[value] = max(last.get(value, 0), end)
    return last


def _sources(program: Program, stored: set[int]) -> dict[int, set[int]]:
    """Return the stored values that each value is computed from by fused operations."""
    sources = {value: {value} for value in stored}
    for x in program.operations:
        read = set() if x.name in PRODUCTS else set().union(*(sources[y] for y in x.inputs))
        for value in x.outputs:
            sources.setdefault(value, read)
    return sources


def _inner(x: Operation) -> Iterator[tuple[core.Jaxpr, int]]:
    """Yield the programs that an operation runs, and how often."""
    params = x.equation.params
    match x.name:
        case "scan":
            yield _open(params["jaxpr"]), params["length"]
        case "while":
            yield _open(params["body_jaxpr"]), 1
        case "cond":
            yield _open(params["branches"][-1]), 1


def products(jaxpr: core.Jaxpr) -> float:
    """Count the FLOPs of the matmuls in one program of a kernel."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            total += product(equation)
        total += sum(
            products(_open(x))
            for values in equation.params.values()
            for x in (values if isinstance(values, tuple) else (values,))
            if isinstance(x, core.Jaxpr | core.ClosedJaxpr)
        )
    return total


def product(equation: Any) -> float:
    """Count the FLOPs of a matmul or a convolution, in bf16 passes of the matrix unit."""
    params, (left, right) = equation.params, (x.aval for x in equation.invars[:2])
    size = math.prod(equation.outvars[0].aval.shape)
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        each = math.prod(left.shape[axis] for axis in contracted)
    else:
        out = params["dimension_numbers"].rhs_spec[0]
        each = math.prod(right.shape) // right.shape[out]
    precision = params.get("precision")
    name = str(precision[0] if isinstance(precision, tuple) else precision).lower()
    passes = PASSES.get(name, 1) if jnp.dtype(left.dtype).itemsize == 4 else 1
    return 2.0 * size * each * passes
