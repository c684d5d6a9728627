"""XLA's optimised HLO text as computations of instructions, and the way that a step takes through.

A pure function of `compiled.as_text()`, since XLA's own cost analysis counts the body of a loop
once. Loops here are `lax.scan`s: their trip counts stand in the text. What the text has more than
this reader knows is an error, not a smaller number.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16}
_CALLS = ("call", "call-start", "conditional", "async-start", "fusion")
_HOST = 5  # the memory space of arrays that lie with the host


class Shape(NamedTuple):
    """One array. `fast`: in memory on the chip, which costs no HBM traffic."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False
    order: tuple[int, ...] = ()  # dims from the one that lies closest together on
    tile: tuple[int, ...] = ()  # of the last dims, as they lie; none: nothing is padded

    @property
    def bytes(self) -> int:
        """Of the elements alone."""
        return self._sized(math.prod(self.dims))

    @property
    def padded_bytes(self) -> int:
        """As they lie in memory, in whole tiles."""
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
    shapes: tuple[Shape, ...]  # of the result, a tuple flattened
    operands: tuple[str, ...]
    arguments: str  # as it stands: of a parameter its number, of a constant its value
    attributes: str
    root: bool

    @property
    def source(self) -> str:
        """Where in the program it comes from."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def called(self, *keys: str) -> list[str]:
        """Name the computations that it calls by these attributes, and its branches."""
        matches = [re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes) for key in keys]
        branches = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        names = re.findall(r"%?([\w.\-]+)", branches[1]) if branches else []
        return [match[1] for match in matches if match] + names


Computation = dict[str, Instruction]


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Read computations by name, and the name of the entry. ValueError for what isn't HLO."""
    computations: dict[str, Computation] = {}
    entry, current, pending = "", None, ""
    for line in text.splitlines():
        if current is None:
            header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
            if header and not line.startswith("HloModule"):
                current = computations.setdefault(header[2], {})
                entry = header[2] if header[1] else entry
            continue
        pending = f"{pending}\n{line}" if pending else line
        depth = _depth(pending)
        if depth == -1 and line.startswith("}"):
            current, pending = None, ""
        elif depth == 0:  # else the attributes go on in the next line
            if instruction := _instruction(pending):
                current[instruction.name] = instruction
            pending = ""
    if current is not None or entry not in computations:
        raise ValueError(f"HLO breaks off in {pending[:80] or list(computations)[-1:]}")
    return computations, entry


def _depth(text: str) -> int | None:
    """Return how many brackets are open outside of strings; None within a string."""
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text, flags=re.DOTALL)
    if '"' in bare:
        return None
    return sum(map(bare.count, "({[")) - sum(map(bare.count, ")}]"))


def _instruction(text: str) -> Instruction | None:
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", text)
    if not head:
        return None
    rest = text[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest)
    return Instruction(
        name=head[2],
        opcode=opcode,
        shapes=tuple(read_shapes(shape)),
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : end])),
        arguments=rest[len(opcode) + 1 : end],
        attributes=rest[end + 1 :],
        root=bool(head[1]),
    )


def _closing(text: str) -> int:
    """Return where the first parenthesis closes."""
    depth = 0
    for match in re.finditer(r'[()]|"(?:[^"\\]|\\.)*"', text):
        depth += (match[0] == "(") - (match[0] == ")")
        if match[0] == ")" and not depth:
            return match.start()
    raise ValueError(f"unbalanced HLO: {text[:80]}")


def read_shapes(text: str) -> Iterator[Shape]:
    """Read `(f32[8,128]{1,0:T(8,128)S(1)}, u32[])`, flat."""
    for dtype, dims, layout in re.findall(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?", text):
        size = tuple(int(x) for x in dims.split(",") if x)
        order, _, rest = layout.partition(":")
        tile, space = re.search(r"T\(([\d,]+)\)", rest), re.search(r"S\((\d+)\)", rest)
        # GPUs have no tiles, and their space 1 is HBM too.
        fast = bool(tile and space and int(space[1]) not in (0, _HOST))
        yield Shape(
            dtype, size, fast, tuple(int(x) for x in order.split(",") if x),
            tuple(int(x) for x in tile[1].split(",")) if tile else (),
        )  # fmt: skip


def trips(instruction: Instruction, computations: Mapping[str, Computation]) -> int:
    """Read how often a loop runs: XLA says it, or the condition compares a counter to it."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.attributes):
        return int(known[1])
    inside = [computations[name] for name in instruction.called("condition")]
    inside += [computations[n] for c in inside for x in c.values() for n in x.called("calls")]
    limits = {
        int(x.arguments)
        for computation in inside
        for x in computation.values()
        if x.opcode == "constant" and x.arguments.isdigit()
    }
    if len(limits) != 1:
        raise ValueError(f"how often does {instruction.name} run? {sorted(limits)}")
    return limits.pop()


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
            times_inside = times * trips(instruction, computations)
            for body in instruction.called("body"):
                yield from walk(computations, body, times_inside, fused)
        elif instruction.opcode in _CALLS:
            keys = ("to_apply", "calls", "true_computation", "false_computation")
            for called in instruction.called(*keys):
                inside = fused or instruction.opcode == "fusion"
                caller = instruction.source or source
                yield from walk(computations, called, times, inside, caller)
