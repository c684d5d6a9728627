"""What every operation of a compiled step computes and moves, read from its HLO.

FLOPs are those of matmuls and convolutions, in bf16 passes of the matrix unit. Bytes are what an
operation reads from and writes to HBM, in the whole tiles that arrays lie in. Cycles are the
compiler's own estimate, of a kernel its schedule's length.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from clip_jax.pods import hlo
from clip_jax.pods.exchanges import KINDS
from clip_jax.pods.hlo import Computation, Instruction, Shape

# What computes nothing and moves nothing, or is counted where the work is. All else is counted.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "call-start", "async-start", "async-update", "opt-barrier"),
    *("add-dependency", "partition-id", "replica-id", "send", "recv"),
}
# Custom calls that only tell the compiler something.
MARKS = (
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone",
    "ConcatBitcast", "PrepareAsyncCallStart", "PrepareAsyncCallDone",
)  # fmt: skip
UNREAD = ("dynamic-update-slice", *KINDS)  # the first operand, updated in place or sent elsewhere
SLICES = ("dynamic-slice", "slice", "gather")
# What a matmul costs in bf16 passes of the matrix unit, by what its operands are asked to keep.
PASSES = {"default": 1, "high": 3, "highest": 6}
KERNEL = "tpu_custom_call"
_UNKNOWN = 2**62  # cycles from here on stand for none


@dataclass(frozen=True, kw_only=True)
class Work:
    """One instruction of a step, as often as the step takes it."""

    name: str
    part: str  # of the step: see `part_of`
    times: int
    flops: float | None  # each time; None: a kernel that doesn't say
    bytes: int  # each time
    cycles: int | None  # each time; None: a kernel without a schedule
    target: str = ""  # of a call: the kernel's or library's name
    hidden: bool = False  # it only starts: its bytes move while other operations compute


def read(text: str, schedule: Callable[[str], int | None] = lambda name: None) -> list[Work]:
    """List what a step does.

    Args:
      text: optimised HLO, `compiled.as_text()`.
      schedule: gives the cycles of a kernel by its instruction's name.
    """
    computations, entry = hlo.parse(text)
    pieces = [
        (visit, x)
        for visit in hlo.walk(computations, entry)
        if not visit.fused
        for x in visit.computation.values()
        if not (x.opcode in FREE or x.opcode.endswith("-done") or _target(x) in MARKS)
    ]
    kernels: dict[str, int] = {}  # by their program: of equal ones the compiler compiles one
    for _, x in pieces:
        if _target(x) == KERNEL and (cycles := schedule(x.name)) is not None:
            kernels[_program(x)] = cycles
    return [
        Work(
            name=x.name,
            part=part_of(x, visit.source),
            times=visit.times,
            flops=count_flops(x, visit.computation, computations),
            bytes=_traffic(x, visit.computation, computations),
            cycles=kernels.get(_program(x)) if _target(x) == KERNEL else _estimate(x),
            target=_target(x),
            hidden=x.opcode.endswith("-start"),
        )
        for visit, x in pieces
    ]


def part_of(x: Instruction, caller: str = "") -> str:
    """Say what an instruction is for, by the names of the modules that it comes from."""
    source = x.source or caller
    if x.opcode.removesuffix("-start") in KINDS:
        return "collectives"
    moves = x.opcode.startswith("copy") or x.opcode == "slice-start"
    if moves or source.endswith("dynamic_update_slice"):  # what a scan saves
        return "copies"
    for part, pattern in _PARTS:
        if re.search(pattern, source):
            return part
    return "unnamed"


_PARTS = (
    ("norms", r"/(ln_\w+|norm|bn\d|\w*bn)/|batch_norm"),
    ("projections", r"/(in_proj|out_proj|conv1|[qkv]_proj|c_proj_pool)/(?!.*mlp)|/(q|kv|proj)/"),
    ("MLP", r"/mlp/"),
    ("attention", r"/attn|attn_pool|attnpool"),
    ("convolutions", r"/(layer\d|conv\d|downsample)"),
    ("towers, else", r"/(visual|text)|Towers\."),
    ("loss", r"jvp\("),
    ("optimizer", r"jit\("),
)


def _target(x: Instruction) -> str:
    target = re.search(r'custom_call_target="([^"]*)"', x.attributes)
    return target[1] if target and x.opcode == "custom-call" else ""


def _program(kernel: Instruction) -> str:
    body = re.search(r'"body":"([^"]*)"', kernel.attributes)
    return body[1] if body else kernel.name


def _estimate(x: Instruction) -> int:
    cycles = re.search(r'"estimated_cycles":"(\d+)"', x.attributes)
    return int(cycles[1]) if cycles and int(cycles[1]) < _UNKNOWN else 0  # none, as of exchanges


# --------------------------------------------------------------------------------------- FLOPs


def count_flops(
    x: Instruction, computation: Computation, computations: Mapping[str, Computation]
) -> float | None:
    """Count one instruction's FLOPs, a fusion's with all that is in it; None: not known."""
    if x.opcode == "fusion":
        inner = [computations[name] for name in x.called("calls")]
        counts = [count_flops(y, c, computations) for c in inner for y in c.values()]
        return None if None in counts else sum(c for c in counts if c)
    before = [computation[name] for name in x.operands if name in computation]
    operands = [operand.shapes[0] for operand in before if operand.shapes]
    if x.opcode == "dot":
        dims = _numbers(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
        return _passes(x) * 2 * math.prod(x.shapes[0].dims) * _product(operands[0], dims)
    if x.opcode == "convolution":
        return _passes(x) * _convolution(x, *operands[:2], x.shapes[0])
    return _custom_flops(x, operands) if x.opcode == "custom-call" else 0


def _custom_flops(x: Instruction, operands: list[Shape]) -> float | None:
    target = _target(x)
    if target == KERNEL:
        operations = re.search(r'"cost_estimate":\{[^}]*?"flops":"?(\d+)', x.attributes)
        return float(operations[1]) if operations else None
    if target.startswith("__cublas$"):
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', x.attributes)
        dims = [int(d) for d in re.findall(r"\d+", contracted[1])] if contracted else []
        return 2.0 * math.prod(x.shapes[0].dims) * _product(operands[0], dims)
    if target.startswith("__cudnn$conv"):  # of the gradients too, in the forward one's terms
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


def _passes(x: Instruction) -> int:
    precision = re.search(r"operand_precision=\{(\w+)", x.attributes)
    return PASSES[precision[1]] if precision else 1


def _numbers(pattern: str, text: str) -> list[int]:
    window = re.search(pattern, text)
    return [int(n) for n in window[1].split(",") if n] if window else []


def _product(shape: Shape, dims: list[int]) -> int:
    return math.prod(shape.dims[d] for d in dims)


def _convolution(x: Instruction, lhs: Shape, rhs: Shape, result: Shape) -> float:
    """2 × multiply-adds, those with padding and between dilated elements left out, as XLA does."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    if not labels:
        raise ValueError(f"{x.name}: a convolution without dim_labels")
    inputs, kernel, output = labels.groups()
    out = result.dims
    window = re.search(r"window=\{([^}]*)\}", x.attributes)
    fields = dict(f.split("=") for f in window[1].split()) if window else {}
    rank = len(output) - 2

    def values(name: str, default: int) -> list[int]:
        return [int(v) for v in fields[name].split("x")] if name in fields else [default] * rank

    low = (
        [int(p.split("_")[0]) for p in fields["pad"].split("x")] if "pad" in fields else [0] * rank
    )
    steps = zip(
        values("size", 1), values("stride", 1), low, values("lhs_dilate", 1),
        values("rhs_dilate", 1), strict=True,
    )  # fmt: skip
    pairs = 1
    for number, (size, stride, pad, lhs_dilate, rhs_dilate) in enumerate(steps):
        here, there = lhs.dims[inputs.index(str(number))], out[output.index(str(number))]
        places = (
            o * stride - pad + k * rhs_dilate
            for o, k in itertools.product(range(there), range(size))
        )
        pairs *= sum(not p % lhs_dilate and 0 <= p < here * lhs_dilate for p in places)
    groups = _numbers(r"batch_group_count=(\d+)", x.attributes) or [1]
    return (
        2.0 * pairs * out[output.index("b")] * out[output.index("f")]
        * rhs.dims[kernel.index("i")] / groups[0]
    )  # fmt: skip


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
    inner: Computation, number: int, computations: Mapping[str, Computation], whole: Instruction
) -> int:
    """Count what a fusion reads of one operand: all, the slices it takes, or nothing of it."""
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
            places = [place for place, name in enumerate(x.operands) if name in names]
            total += sum(_read(called, place, computations, whole) for place in places)
        elif x.opcode not in UNREAD or x.operands[0] not in names:
            return _slow(whole)
    return min(total, _slow(whole))


def _results(inner: Computation) -> list[Instruction]:
    [root] = [x for x in inner.values() if x.root]
    return [inner[name] for name in root.operands] if root.opcode == "tuple" else [root]


def _written(x: Instruction, inner: Computation, computations: Mapping[str, Computation]) -> int:
    """Count what a fusion writes for one result: an update in place, or all of it."""
    while x.opcode == "bitcast":
        x = inner[x.operands[0]]
    if x.opcode == "dynamic-update-slice":
        return sum(shape.padded_bytes for shape in inner[x.operands[1]].shapes)
    if x.opcode == "fusion" and len(x.shapes) == 1:
        [called] = (computations[name] for name in x.called("calls"))
        return _written(_results(called)[0], called, computations)
    # What a fusion hands through, or an exchange that goes on behind it, it does not write.
    return 0 if x.opcode in ("parameter", *KINDS) else sum(s.padded_bytes for s in x.shapes)


def _origin(x: Instruction, computation: Computation) -> str:
    """Name the array behind views of it: read in several windows, it is read once."""
    while x.opcode == "bitcast" and x.operands[0] in computation:
        x = computation[x.operands[0]]
    return x.name


def _slow(x: Instruction) -> int:
    return sum(shape.padded_bytes for shape in x.shapes if not shape.fast)
