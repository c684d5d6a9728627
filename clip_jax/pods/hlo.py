"""XLA's optimised HLO text as computations of instructions, and a walk through what a step runs.

XLA's own cost analysis counts the body of a loop once; this module reads nothing but
`compiled.as_text()`. Loops are `lax.scan`s, with their trip counts in the text. Unknown syntax
is an error, not a smaller number.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from clip_jax.models.text_lengths import SCOPE

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_CALLS = ("call", "call-start", "conditional", "async-start", "fusion")
_HEAD = re.compile(r"^  (ROOT )?%?([\w.\-]+) = ")
_HOST = 5  # the memory space of arrays in the host's memory


def search(pattern: str, text: str) -> str:
    """Return the first group of a pattern's first match; "" without a match."""
    match = re.search(pattern, text)
    return match[1] if match else ""


def numbers(text: str) -> tuple[int, ...]:
    """Read `8,128`."""
    return tuple(int(x) for x in text.split(",") if x)


class Shape(NamedTuple):
    """One array. `fast` means on-chip memory, which causes no HBM traffic."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False
    order: tuple[int, ...] = ()  # dims from minor to major
    tile: tuple[int, ...] = ()  # sizes along the minor dims; empty: no padding

    @property
    def bytes(self) -> int:
        """Size of the elements, without padding."""
        return self._sized(math.prod(self.dims))

    @property
    def padded_bytes(self) -> int:
        """Size in memory, padded to complete tiles."""
        if not self.tile:
            return self.bytes
        lying = [self.dims[i] for i in reversed(self.order)]
        lying = [1] * (len(self.tile) - len(lying)) + lying
        split = len(lying) - len(self.tile)
        tiles = zip(lying[split:], self.tile, strict=True)
        return self._sized(math.prod(lying[:split]) * math.prod(-(-d // t) * t for d, t in tiles))

    def _sized(self, elements: int) -> int:
        bits = re.search(r"\d+", self.dtype)
        return int(elements * (BYTES.get(self.dtype) or (int(bits[0]) / 8 if bits else 0)))


class Instruction(NamedTuple):
    """One instruction of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # shapes of the result; a tuple is flattened
    operands: tuple[str, ...]
    arguments: str  # verbatim: the number of a parameter, the value of a constant
    attributes: str
    root: bool

    @property
    def source(self) -> str:
        """Its origin in the program: the op_name."""
        return search(r'op_name="([^"]*)"', self.attributes)

    def called(self, *keys: str) -> list[str]:
        """Return the computations that it calls by these attributes, and its branches."""
        names = [search(rf"\b{key}=%?([\w.\-]+)", self.attributes) for key in keys]
        branches = search(r"branch_computations=\{([^}]*)\}", self.attributes)
        return [name for name in names if name] + re.findall(r"%?([\w.\-]+)", branches)


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Return computations by name, and the entry's name. Raises ValueError for invalid HLO."""
    bodies: dict[str, list[str]] = {}
    entry, name = "", None
    for line in text.splitlines():
        if name is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if header and not line.startswith("HloModule"):
                name = header[2]
                bodies[name] = []
                entry = name if header[1] else entry
        elif re.match(r"\}(, execution_thread=.*)?$", line):
            name = None
        elif _HEAD.match(line):
            bodies[name].append(line)
        elif bodies[name]:  # attributes continue on the next line
            bodies[name][-1] += f"\n{line}"
    if name is not None or entry not in bodies:
        raise ValueError(f"HLO breaks off in {name or list(bodies)[-1:]}")
    computations = {
        name: {x.name: x for x in map(_instruction, lines)} for name, lines in bodies.items()
    }
    return computations, entry


def _instruction(text: str) -> Instruction:
    _, is_root, name, rest = _HEAD.split(text, maxsplit=1)
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest)
    return Instruction(
        name=name,
        opcode=opcode,
        shapes=tuple(read_shapes(shape)),
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : end])),
        arguments=rest[len(opcode) + 1 : end],
        attributes=rest[end + 1 :],
        root=bool(is_root),
    )


def _closing(text: str) -> int:
    """Return the position at which the first parenthesis closes."""
    depth = 0
    for match in re.finditer(r'[()]|"(?:[^"\\]|\\.)*"', text):
        depth += (match[0] == "(") - (match[0] == ")")
        if match[0] == ")" and not depth:
            return match.start()
    raise ValueError(f"unbalanced HLO: {text[:80]}")


def read_shapes(text: str) -> Iterator[Shape]:
    """Read `(f32[8,128]{1,0:T(8,128)S(1)}, u32[])`, flat."""
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text):
        order, _, rest = layout.partition(":")
        tile, space = numbers(search(r"T\(([\d,]+)\)", rest)), search(r"S\((\d+)\)", rest)
        # On GPUs, without tiles, memory space 1 is HBM, too.
        fast = bool(tile and space and int(space) not in (0, _HOST))
        yield Shape(dtype, numbers(dims), fast, numbers(order), tile)


def trips(instruction: Instruction, computations: Mapping[str, Computation]) -> int:
    """Return the trip count of a loop: as XLA states it, or as its condition's only constant."""
    if count := search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes):
        return int(count)
    inside = [computations[name] for name in instruction.called("condition")]
    inside += [computations[n] for c in inside for x in c.values() for n in x.called("calls")]
    limits = {
        int(x.arguments)
        for computation in inside
        for x in computation.values()
        if x.opcode == "constant" and x.arguments.isdigit()
    }
    if len(limits) != 1:
        raise ValueError(f"trip count of {instruction.name} is one of {sorted(limits)}: not known")
    return limits.pop()


def taken(conditional: Instruction, computations: Mapping[str, Computation]) -> list[str]:
    """Return the branches that a step may run: of the choice for texts in groups by length, the
    branch for texts that fit their groups, as in most steps; else all."""
    branches = conditional.called("false_computation", "true_computation")
    by_length = f"/{SCOPE}/cond/branch_1_fun"
    usual = [
        name for name in branches if any(by_length in x.source for x in computations[name].values())
    ]
    return usual or branches


class Visit(NamedTuple):
    """One computation that a step runs, with the number of its executions."""

    name: str
    computation: Computation
    times: int
    fused: bool  # within a fusion, whose memory traffic is the fusion's
    source: str  # origin of the fusion in the program


def walk(
    computations: Mapping[str, Computation],
    name: str,
    times: int = 1,
    fused: bool = False,
    source: str = "",
) -> Iterator[Visit]:
    """Visit all computations that a step runs, with the number of their executions."""
    yield Visit(name, computations[name], times, fused, source)
    for instruction in computations[name].values():
        if instruction.opcode == "while":
            times_inside = times * trips(instruction, computations)
            for body in instruction.called("body"):
                yield from walk(computations, body, times_inside, fused)
        elif instruction.opcode in _CALLS:
            is_choice = instruction.opcode == "conditional"
            calls = instruction.called("to_apply", "calls")
            if is_choice:
                calls = taken(instruction, computations)
            for called in calls:
                inside = fused or instruction.opcode == "fusion"
                caller = instruction.source or source
                yield from walk(computations, called, times, inside, caller)
