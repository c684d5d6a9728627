"""Read the FLOPs, memory traffic and cycles of every operation of a compiled step from its HLO.

FLOPs are those of matmuls and convolutions, in bf16 passes of the matrix unit. Bytes are what an
operation reads from and writes to HBM, arrays padded to complete tiles. Cycles are counted twice:
by XLA's cost model, and in the final schedules of a TPU.
"""

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clip_jax.models.tower import parts_of
from clip_jax.pods import hlo
from clip_jax.pods.collectives import KINDS
from clip_jax.pods.hlo import Computation, Instruction, Shape, numbers, search
from clip_jax.pods.schedule import Schedule

# Opcodes that cost nothing, or whose work is counted elsewhere. All others are counted.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "call-start", "async-start", "async-update", "opt-barrier"),
    *("add-dependency", "partition-id", "replica-id", "send", "recv"),
}
# Custom calls that only inform the compiler.
MARKS = (
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
    "ConcatBitcast",
    "PrepareAsyncCallStart",
    "PrepareAsyncCallDone",
)
# Opcodes that do not read their first operand, but update it in place or send it elsewhere.
UNREAD = ("dynamic-update-slice", *KINDS)
SLICES = ("dynamic-slice", "slice", "gather")
# bf16 passes of the matrix unit per matmul, by the precision of its float32 operands.
PASSES = {"default": 1, "high": 3, "highest": 6}
KERNEL = "tpu_custom_call"
_UNKNOWN = 2**62  # the compiler writes at least this for unknown cycles


@dataclass(frozen=True, kw_only=True)
class Work:
    """One instruction of a step, with its cost per execution."""

    name: str
    opcode: str
    part: str  # part of the step: see `part_of`
    times: int  # executions per step
    flops: float | None  # None: a kernel without a cost estimate
    bytes: int  # HBM traffic
    cycles: int | None  # by XLA's cost model, of a kernel by its schedule; None: not known
    schedule: int | None = None  # cycles of the final schedule; None: not known
    matrix: int = 0  # of these, cycles of the matrix units, in complete tiles
    target: str = ""  # name of a called kernel or library
    hidden: bool = False  # asynchronous: its bytes move while other operations compute


def read(
    text: str,
    schedules: Mapping[str, Schedule] | None = None,
    parts: Mapping[str, str] | None = None,
) -> list[Work]:
    """List the operations of a step.

    Args:
      text: optimised HLO, `compiled.as_text()`.
      schedules: by name of the instruction. The compiler compiles equal operations once; those
        of the same kind, arrays and estimate are taken as equal.
      parts: names of the parts of a step, and patterns of their modules' names, by default those
        of the common layers (see `tower.parts_of`).
    """
    computations, entry = hlo.parse(text)
    pieces = [
        (visit, x)
        for visit in hlo.walk(computations, entry)
        if not visit.fused
        for x in visit.computation.values()
        if not (x.opcode in FREE or x.opcode.endswith("-done") or _target(x) in MARKS)
    ]
    equal = {
        _program(x, visit.computation): schedules[x.name]
        for visit, x in pieces
        if schedules and x.name in schedules
    }
    patterns = (parts_of() if parts is None else dict(parts)) | _OTHER_PARTS
    works = []
    for visit, x in pieces:
        schedule = equal.get(_program(x, visit.computation))
        works.append(
            Work(
                name=x.name,
                opcode=x.opcode,
                part=part_of(x, patterns, visit.source),
                times=visit.times,
                flops=count_flops(x, visit.computation, computations),
                bytes=_traffic(x, visit.computation, computations),
                cycles=schedule and schedule.cycles if _target(x) == KERNEL else _estimate(x),
                schedule=schedule and schedule.cycles,
                matrix=schedule.matrix if schedule else 0,
                target=_target(x),
                hidden=x.opcode.endswith("-start"),
            )
        )
    return works


def part_of(x: Instruction, patterns: Mapping[str, str], caller: str = "") -> str:
    """Return the part of the step that an instruction belongs to, by its modules' names."""
    source = x.source or caller
    if x.opcode.removesuffix("-start") in KINDS:
        return "collectives"
    moves = x.opcode.startswith("copy") or x.opcode == "slice-start"
    if moves or source.endswith("dynamic_update_slice"):  # what a scan saves
        return "copies"
    matching = (part for part, pattern in patterns.items() if re.search(pattern, source))
    return next(matching, "unnamed")


_OTHER_PARTS = {  # what belongs to no part of a tower
    "towers, else": r"/(visual|text)|Towers\.",
    "loss": r"jvp\(",
    "optimizer": r"jit\(",
}


def _target(x: Instruction) -> str:
    is_call = x.opcode == "custom-call"
    return search(r'custom_call_target="([^"]*)"', x.attributes) if is_call else ""


def _program(x: Instruction, computation: Computation) -> Hashable:
    """Return a key that is the same for equal operations."""
    if _target(x) == KERNEL:
        return search(r'"body":"([^"]*)"', x.attributes) or x.name
    operands = [computation[name].shapes for name in x.operands if name in computation]
    return x.opcode, x.shapes, tuple(operands), _estimate(x)


def _estimate(x: Instruction) -> int:
    cycles = int(search(r'"estimated_cycles":"(\d+)"', x.attributes) or 0)
    return cycles if cycles < _UNKNOWN else 0  # unknown, as for collectives


# --------------------------------------------------------------------------------------- FLOPs


def count_flops(
    x: Instruction, computation: Computation, computations: Mapping[str, Computation]
) -> float | None:
    """Count the FLOPs of an instruction, or of all in a fusion; None: not known."""
    if x.opcode == "fusion":
        inner = [computations[name] for name in x.called("calls")]
        counts = [count_flops(y, c, computations) for c in inner for y in c.values()]
        return None if None in counts else sum(c for c in counts if c)
    before = [computation[name] for name in x.operands if name in computation]
    operands = [operand.shapes[0] for operand in before if operand.shapes]
    if x.opcode == "dot":
        dims = numbers(search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes))
        return _passes(x, operands) * _product(x.shapes[0], operands[0], dims)
    if x.opcode == "convolution":
        return _passes(x, operands) * _convolution(x, *operands[:2], x.shapes[0])
    return _custom_flops(x, operands) if x.opcode == "custom-call" else 0


def _custom_flops(x: Instruction, operands: list[Shape]) -> float | None:
    target = _target(x)
    if target == KERNEL:
        flops = search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', x.attributes)
        splash = search(r"splash_mha_(fwd|dq|dkv)", x.source)  # JAX's kernels have no estimate
        if not flops and splash:
            batch, heads, length, dim = next(s.dims for s in operands if len(s.dims) == 4)
            return {"fwd": 4.0, "dq": 6.0, "dkv": 8.0}[splash] * batch * heads * length**2 * dim
        return float(flops) if flops else None
    if target.startswith("__cublas$"):
        contracted = search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', x.attributes)
        return _product(x.shapes[0], operands[0], numbers(contracted.replace('"', "")))
    if target.startswith("__cudnn$conv"):  # gradients have the FLOPs of the forward convolution
        first, second, result = *operands[:2], x.shapes[0]
        if "BackwardInput" in target:
            return _convolution(x, result, second, first)
        if "BackwardFilter" in target:
            return _convolution(x, first, result, second)
        return _convolution(x, first, second, result)
    if target.startswith("__cudnn$fmha"):  # two products forward, five backward, q and k first
        (batch, length, heads, dim), keys = operands[0].dims, operands[1].dims[1]
        return (10.0 if "Backward" in target else 4.0) * batch * heads * length * keys * dim
    return 0


def _passes(x: Instruction, operands: Sequence[Shape]) -> int:
    """Count the passes; operands that are bf16 already need one at any precision."""
    if "f32" not in [operand.dtype for operand in operands[:2]]:
        return 1
    return PASSES[search(r"operand_precision=\{(\w+)", x.attributes) or "default"]


def _product(result: Shape, lhs: Shape, contracted: tuple[int, ...]) -> float:
    return 2.0 * math.prod(result.dims) * math.prod(lhs.dims[d] for d in contracted)


def _convolution(x: Instruction, lhs: Shape, rhs: Shape, result: Shape) -> float:
    """Count 2 FLOPs per multiply-add, without padding and dilation holes, as XLA does."""
    labels = search(r"dim_labels=(\w+->\w+)", x.attributes)
    inputs, kernel, output = re.split("_|->", labels)  # fails without dim_labels
    fields = dict(f.split("=") for f in search(r"window=\{([^}]*)\}", x.attributes).split())

    def of_window(name: str, default: int, dim: int) -> int:
        return int(fields[name].split("x")[dim].split("_")[0]) if name in fields else default

    pairs = 1  # pairs of an output and an input position that a weight joins
    for dim in range(len(output) - 2):
        outputs = np.arange(result.dims[output.index(str(dim))])[:, None]
        weights = np.arange(of_window("size", 1, dim))
        positions = (
            outputs * of_window("stride", 1, dim)
            - of_window("pad", 0, dim)
            + weights * of_window("rhs_dilate", 1, dim)
        )
        dilation = of_window("lhs_dilate", 1, dim)
        end = lhs.dims[inputs.index(str(dim))] * dilation
        inside = (positions % dilation == 0) & (positions >= 0) & (positions < end)
        pairs *= int(inside.sum())
    groups = int(search(r"batch_group_count=(\d+)", x.attributes) or 1)
    batch, features = (result.dims[output.index(label)] for label in "bf")
    return 2.0 * pairs * batch * features * rhs.dims[kernel.index("i")] / groups


# --------------------------------------------------------------------------------------- bytes


def _traffic(
    x: Instruction, computation: Computation, computations: Mapping[str, Computation]
) -> int:
    slow = _slow(x)
    operands = [computation[name] for name in x.operands if name in computation]
    if x.opcode == "copy-start":  # (destination, source, context)
        return sum(shape.padded_bytes for shape in x.shapes[:2] if not shape.fast)
    if x.opcode == "slice-start":  # (source, destination, context)
        return x.shapes[1].padded_bytes * sum(not shape.fast for shape in x.shapes[:2])
    if x.opcode == "custom-call" and not operands:  # reserves memory
        return 0
    if x.opcode in SLICES:
        return slow * (1 if operands[0].shapes[0].fast else 2)
    if x.opcode == "dynamic-update-slice":
        return 2 * _slow(operands[1])
    if x.opcode != "fusion":
        return slow + sum(map(_slow, {_origin(x, computation): x for x in operands}.values()))
    [inner] = (computations[name] for name in x.called("calls"))
    read = sum(
        _slow(operand) and _read(inner, number, computations, operand)
        for number, operand in enumerate(operands)
    )
    written = zip(x.shapes, _results(inner), strict=False)
    return read + sum(
        0 if shape.fast else _written(result, inner, computations) for shape, result in written
    )


def _read(
    inner: Computation, number: int, computations: Mapping[str, Computation], operand: Instruction
) -> int:
    """Count the bytes that a fusion reads of an operand: all, some slices, or none."""
    names = {
        x.name for x in inner.values() if x.opcode == "parameter" and x.arguments == str(number)
    }
    total = 0
    for x in inner.values():  # in order of use
        if not names & set(x.operands):
            continue
        if x.opcode == "bitcast":
            names.add(x.name)
        elif x.opcode in SLICES and x.operands[0] in names:
            total += sum(shape.padded_bytes for shape in x.shapes)
        elif x.opcode == "fusion":
            [called] = (computations[name] for name in x.called("calls"))
            numbers = [i for i, name in enumerate(x.operands) if name in names]
            total += sum(_read(called, i, computations, operand) for i in numbers)
        elif x.opcode not in UNREAD or x.operands[0] not in names:
            return _slow(operand)
    return min(total, _slow(operand))


def _results(inner: Computation) -> list[Instruction]:
    [root] = [x for x in inner.values() if x.root]
    return [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written(x: Instruction, inner: Computation, computations: Mapping[str, Computation]) -> int:
    """Count the bytes that a fusion writes for a result: an update in place, or all of it."""
    while x.opcode == "bitcast":
        x = inner[x.operands[0]]
    if x.opcode == "dynamic-update-slice":
        return sum(shape.padded_bytes for shape in inner[x.operands[1]].shapes)
    if x.opcode == "fusion" and len(x.shapes) == 1:
        [called] = (computations[name] for name in x.called("calls"))
        return _written(_results(called)[0], called, computations)
    # A fusion does not write a parameter that it returns, or an unfinished collective.
    return 0 if x.opcode in ("parameter", *KINDS) else sum(s.padded_bytes for s in x.shapes)


def _origin(x: Instruction, computation: Computation) -> str:
    """Return the name of the array that views refer to, so that it is counted once."""
    while x.opcode == "bitcast" and x.operands[0] in computation:
        x = computation[x.operands[0]]
    return x.name


def _slow(x: Instruction) -> int:
    return sum(shape.padded_bytes for shape in x.shapes if not shape.fast)
