"""What a compiled step moves: its collectives and its memory traffic, read from XLA's HLO text.

A pure function of the text of `compiled.as_text()`, since XLA's own cost analysis counts the body
of a loop once. Loops here are `lax.scan`s: their trip counts stand in the text.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What computes nothing and moves nothing, or is counted where the work is.
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call", "async-start", "opt-barrier", "partition-id", "replica-id"),
}
UNREAD = ("dynamic-update-slice", *KINDS)  # the first operand, updated in place or sent elsewhere
SLICES = ("dynamic-slice", "slice", "gather")


class Shape(NamedTuple):
    """One array. `fast`: in memory on the chip, which costs no HBM traffic."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        size = BYTES.get(self.dtype) or (int(bits[0]) / 8 if bits else 0)
        return int(math.prod(self.dims) * size)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # of the result, a tuple flattened
    operands: tuple[str, ...]
    arguments: str  # as it stands: of a parameter its number, of a constant its value
    attributes: str
    root: bool


Computation = dict[str, Instruction]


class Collective(NamedTuple):
    """One exchange between devices, as often as a step does it."""

    kind: str  # one of KINDS
    shapes: tuple[Shape, ...]  # of the result on one device; of a reduce-scatter, of the operand
    axes: tuple[str, ...]  # mesh axes along which the members of a group differ
    group_size: int
    slices: int  # over which the members of a group are spread
    times: int  # a step
    source: str  # where in the program it comes from

    @property
    def bytes(self) -> int:
        """What one device holds of it at once, over the step."""
        return self.times * sum(shape.bytes for shape in self.shapes)

    @property
    def received(self) -> int:
        """What one device receives at least over the links inside its slice, over the step."""
        return self._received(self.group_size // self.slices)

    @property
    def received_from_slices(self) -> int:
        """What one device receives at least from other slices, if all of a slice share the work."""
        return self._received(self.slices) * self.slices // self.group_size

    def _received(self, members: int) -> int:
        match self.kind:
            case "collective-permute":
                return self.bytes if members > 1 else 0
            case "all-reduce":  # a reduce-scatter, then an all-gather
                return 2 * self.bytes * (members - 1) // members
        return self.bytes * (members - 1) // members


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Read computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if header and not line.startswith("HloModule"):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif instruction := _instruction(line):
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    found = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest)
    return Instruction(
        name=found[2],
        opcode=opcode,
        shapes=tuple(_shapes(shape)),
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : end])),
        arguments=rest[len(opcode) + 1 : end],
        attributes=rest[end + 1 :],
        root=bool(found[1]),
    )


def _closing(text: str) -> int:
    """Return where the first parenthesis closes."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and not depth:
            return place
    raise ValueError(f"unbalanced HLO: {text[:80]}")


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text):
        size = tuple(int(x) for x in dims.split(",") if x)
        yield Shape(dtype, size, "S(1)" in layout)


def _called(instruction: Instruction, *keys: str) -> list[str]:
    found = [re.search(rf"\b{key}=%?([\w.\-]+)", instruction.attributes) for key in keys]
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
    return [match[1] for match in found if match] + names


def _trips(instruction: Instruction, computations: Mapping[str, Computation]) -> int:
    """Read how often a loop runs: XLA says it, or the condition compares a counter to it."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes):
        return int(known[1])
    [condition] = _called(instruction, "condition")
    limits = [
        int(x.arguments)
        for x in computations[condition].values()
        if x.opcode == "constant" and x.arguments.isdigit()
    ]
    return limits[0] if len(limits) == 1 else 1


class Visit(NamedTuple):
    """One computation on the way through a step."""

    name: str
    computation: Computation
    times: int
    fused: bool  # within a fusion, whose memory traffic is the fusion's
    source: str  # where in the program the fusion comes from


def walk(
    computations: Mapping[str, Computation],
    name: str,
    times: int = 1,
    fused: bool = False,
    source: str = "",
) -> Iterator[Visit]:
    """Visit all computations that a step runs, with how often it does."""
    yield Visit(name, computations[name], times, fused, source)
    for instruction in computations[name].values():
        if instruction.opcode == "while":
            times_inside = times * _trips(instruction, computations)
            for body in _called(instruction, "body"):
                yield from walk(computations, body, times_inside, fused)
        elif instruction.opcode in ("call", "conditional", "async-start", "fusion"):
            keys = ("to_apply", "calls", "true_computation", "false_computation")
            for called in _called(instruction, *keys):
                inside = fused or instruction.opcode == "fusion"
                caller = _source(instruction) or source
                yield from walk(computations, called, times, inside, caller)


def collectives(text: str, mesh: Mapping[str, int], slices: int = 1) -> list[Collective]:
    """List the collectives of a step, the largest first.

    Args:
      text: optimised HLO, `compiled.as_text()`.
      mesh: axis -> size, in the order of the devices.
      slices: into how many slices (joined by a slower network) the devices fall, in order.
    """
    devices = math.prod(mesh.values())
    found: dict[tuple[object, ...], Collective] = {}
    computations, entry = parse(text)
    for visit in walk(computations, entry):
        for x in visit.computation.values():
            if between := re.search(r'_xla_megascale_transfer_type="(\w+)"', x.attributes):
                # Over the network from the same chip of every other slice, which lie along data.
                if x.opcode == "recv":
                    found[visit.name, x.name] = Collective(
                        between[1].lower().replace("_", "-"), x.shapes[:1], ("data",), slices,
                        slices, visit.times, "",
                    )  # fmt: skip
                continue
            kind = x.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            groups = _groups(x.attributes, devices)
            shapes = _moved(x, kind, visit.computation)
            if visit.name.startswith("all-reduce-scatter"):  # and the slice that is kept, as one
                kind = "reduce-scatter"
            # TPUs fuse one exchange with several computations that hide it: one channel, once.
            channel = re.search(r"channel_id=(\d+)", x.attributes)
            key = (channel and channel[1], kind, shapes) if visit.fused else (visit.name, x.name)
            times = min(visit.times, found[key].times) if key in found else visit.times
            found[key] = Collective(
                kind, shapes, _axes(groups, mesh), groups.shape[1],
                len(np.unique(groups[0] * slices // devices)), times,
                _source(x) or visit.source,
            )  # fmt: skip
    moving = [x for x in found.values() if x.group_size > 1]
    return sorted(moving, key=lambda x: (-x.received, x.kind, x.source))


def _source(x: Instruction) -> str:
    found = re.search(r'op_name="([^"]*)"', x.attributes)
    return found[1] if found else ""


def _moved(x: Instruction, kind: str, computation: Computation) -> tuple[Shape, ...]:
    if kind == "reduce-scatter":
        return tuple(s._replace(fast=False) for o in x.operands for s in computation[o].shapes)
    shapes = x.shapes
    if x.opcode == "all-gather-start":  # (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    if x.opcode == "collective-permute-start":  # (operand, result, contexts)
        shapes = shapes[1:2]
    return tuple(shape._replace(fast=False) for shape in shapes)


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Read which devices exchange with each other, [groups, members]."""
    ids = np.arange(devices)
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", attributes):
        return np.array(
            [[int(x) for x in p.split(",")] for p in re.findall(r"\{([\d,]+)", pairs[1])]
        )
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes):
        rows = re.findall(r"\{([\d,]+)\}", listed[1])
        return np.array([[int(x) for x in row.split(",")] for row in rows])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?)(?:,\s|$)", attributes):
        return _iota(iota[2]).reshape([int(x) for x in iota[1].split(",")])
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))?", attributes
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2]) if named[2] else ids
        used = re.match(r"[^{]*\{([^}]*)\}", attributes[named.end() :])
        axes = re.findall(r"'(\w+)'", used[1]) if used else []
        order = [name for name in sizes if name not in axes] + axes
        array = ids.reshape(list(sizes.values())).transpose([list(sizes).index(n) for n in order])
        return array.reshape(-1, math.prod(sizes[name] for name in axes))
    return ids.reshape(1, -1)


def _iota(text: str) -> np.ndarray:
    """Read `[2,4]T(1,0)`: the numbers from 0 on in that shape, then transposed."""
    shape, _, order = text.partition("T")
    dims = [int(x) for x in re.findall(r"\d+", shape)]
    array = np.arange(math.prod(dims)).reshape(dims)
    return array.transpose([int(x) for x in re.findall(r"\d+", order)]) if order else array


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    coordinates = np.unravel_index(groups, tuple(mesh.values()))
    pairs = zip(mesh, coordinates, strict=True)
    return tuple(axis for axis, c in pairs if (c != c[:, :1]).any())


def hbm_bytes(text: str) -> int:
    """Count what a step reads from and writes to HBM: every operation its operands and results.

    A fusion reads each operand once, of one that it only slices the slice; an update in place
    writes what it updates. What lies on the chip is free.
    """
    computations, entry = parse(text)
    total = 0
    for visit in walk(computations, entry):
        if not visit.fused:
            for x in visit.computation.values():
                total += visit.times * _traffic(x, visit.computation, computations)
    return total


def _traffic(
    x: Instruction, computation: Computation, computations: Mapping[str, Computation]
) -> int:
    if x.opcode in FREE or x.opcode.endswith("-done"):
        return 0
    slow = sum(shape.bytes for shape in x.shapes if not shape.fast)
    operands = [computation[name] for name in x.operands if name in computation]
    if x.opcode == "copy-start":  # (destination, source, context)
        return sum(shape.bytes for shape in x.shapes[:2] if not shape.fast)
    if x.opcode == "slice-start":  # (source, destination, context)
        return x.shapes[1].bytes * sum(not shape.fast for shape in x.shapes[:2])
    if x.opcode == "custom-call" and not operands:  # reserves memory
        return 0
    if x.opcode in SLICES:
        return slow * (1 if operands[0].shapes[0].fast else 2)
    if x.opcode == "dynamic-update-slice":
        return 2 * _slow(operands[1])
    if x.opcode != "fusion":
        return slow + sum(map(_slow, operands))
    [inner] = (computations[name] for name in _called(x, "calls"))
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
            total += sum(shape.bytes for shape in x.shapes)
        elif x.opcode == "fusion":
            [called] = (computations[name] for name in _called(x, "calls"))
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
        return sum(shape.bytes for shape in inner[x.operands[1]].shapes)
    if x.opcode == "fusion" and len(x.shapes) == 1:
        [called] = (computations[name] for name in _called(x, "calls"))
        return _written(_results(called)[0], called, computations)
    # What a fusion hands through, or an exchange that goes on behind it, it does not write.
    return 0 if x.opcode in ("parameter", *KINDS) else sum(shape.bytes for shape in x.shapes)


def _slow(x: Instruction) -> int:
    return sum(shape.bytes for shape in x.shapes if not shape.fast)
