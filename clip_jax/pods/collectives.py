"""Read the collectives of a compiled step from its HLO: their devices and their bytes."""

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clip_jax.pods import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
Arrays = tuple[tuple[str, tuple[int, ...]], ...]  # dtype and dims of each array


@dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective; bytes are those of one device in a step."""

    kind: str  # one of KINDS
    axes: tuple[str, ...]  # mesh axes along which the members of a group differ
    part: str  # part of the step, such as "text tower, forward"
    source: str  # op_name of the instruction: its origin in the program
    arrays: Arrays  # its results on one device; of a reduce-scatter, its operands
    times: int  # executions per step
    bytes: int  # size of the arrays times executions
    received: int  # lower bound of bytes received within a slice or node
    received_from_slices: int  # the same from other slices or nodes, if devices share the work
    overlapped: bool = False  # asynchronous, with other operations between its start and its end


def collectives(text: str, mesh: Mapping[str, int], slices: int = 1) -> list[Collective]:
    """List the collectives of a step, the largest first.

    Args:
      text: optimised HLO, `compiled.as_text()`.
      mesh: axis -> size, in the order of the devices.
      slices: number of consecutive groups of devices that a slower network joins.
    """
    devices = math.prod(mesh.values())
    result: dict[tuple[object, ...], Collective] = {}
    computations, entry = hlo.parse(text)
    for visit in hlo.walk(computations, entry):
        for x in visit.computation.values():
            key, times = (visit.name, x.name), visit.times
            if between := hlo.search(r'_xla_megascale_transfer_type="(\w+)"', x.attributes):
                # From the same chip of every other slice, over the network along the first axis.
                if x.opcode == "recv":
                    kind, arrays = between.lower().replace("_", "-"), (x.shapes[0][:2],)
                    axis, overlapped = next(iter(mesh)), _is_overlapped(x, visit)
                    result[key] = _collective(
                        kind, arrays, (axis,), slices, slices, times, "", overlapped
                    )
                continue
            kind = x.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            groups = _groups(x.attributes, devices)
            if (members := groups.shape[1]) == 1:
                continue
            arrays = _arrays(x, kind, visit.computation)
            if visit.name.startswith("all-reduce-scatter"):  # fused with the slice that follows
                kind = "reduce-scatter"
            elif visit.fused:
                # TPUs fuse a collective into several computations that hide it: count it once. Of
                # layers without a loop, all have the same channel, but a chain each.
                chain = hlo.search(r'chain_id="(\d+)"', x.attributes)
                channel = hlo.search(r"channel_id=(\d+)", x.attributes)
                key = (chain, "" if chain else channel, kind, arrays)
                times = min(times, result[key].times) if key in result else times
            coordinates = zip(mesh, np.unravel_index(groups, tuple(mesh.values())), strict=True)
            axes = tuple(axis for axis, c in coordinates if (c != c[:, :1]).any())
            spread = len(np.unique(groups[0] * slices // devices))
            result[key] = _collective(
                kind,
                arrays,
                axes,
                members,
                spread,
                times,
                x.source or visit.source,
                _is_overlapped(x, visit),
            )
    return sorted(result.values(), key=lambda x: (-x.received, x.kind, x.source))


def _collective(
    kind: str,
    arrays: Arrays,
    axes: tuple[str, ...],
    members: int,
    slices: int,
    times: int,
    source: str,
    overlapped: bool,
) -> Collective:
    """Count the bytes of a group of `members` devices that spans `slices` slices."""
    size = times * sum(hlo.Shape(*array).bytes for array in arrays)

    def received(members: int) -> int:
        if kind == "collective-permute":
            return size if members > 1 else 0
        phases = 2 if kind == "all-reduce" else 1  # a reduce-scatter, then an all-gather
        return phases * size * (members - 1) // members

    return Collective(
        kind=kind,
        axes=axes,
        part=_part(source),
        source=source,
        arrays=arrays,
        times=times,
        bytes=size,
        received=received(members // slices),
        received_from_slices=received(slices) * slices // members,
        overlapped=overlapped,
    )


def _is_overlapped(x: hlo.Instruction, visit: hlo.Visit) -> bool:
    """Return whether other operations run between the start and the end of a collective."""
    if visit.fused:  # TPUs fuse the steps of an asynchronous collective with such operations
        return not visit.name.startswith("all-reduce-scatter")
    if not x.opcode.endswith(("-start", "recv")):
        return False
    for y in itertools.dropwhile(lambda y: y.name != x.name, visit.computation.values()):
        if y.opcode in ("fusion", "custom-call", "while", "convolution", "dot"):
            return True
        if y.opcode.endswith("-done") and x.name in y.operands:
            break
    return False


# What a module's operations have in their names; a decoder runs its text tower within itself.
_PARTS = {
    "image tower": "/visual",
    "text tower": "/text",
    "caption decoder": "/decoder",
    "loss": "jvp(",
}


def _part(source: str) -> str:
    direction = "backward" if "transpose(" in source else "forward"
    for name, pattern in _PARTS.items():
        if pattern in source:
            return f"{name}, {direction}"
    return "update" if source else "unnamed"  # added by the compiler


def _arrays(x: hlo.Instruction, kind: str, computation: hlo.Computation) -> Arrays:
    shapes = x.shapes
    if kind == "reduce-scatter":
        shapes = [shape for operand in x.operands for shape in computation[operand].shapes]
    if x.opcode == "all-gather-start":  # (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    if x.opcode == "collective-permute-start":  # (operand, result, contexts)
        shapes = shapes[1:2]
    return tuple(shape[:2] for shape in shapes)


def _groups(attributes: str, devices: int) -> np.ndarray:
    """Return the groups of devices that communicate with each other, [groups, members]."""
    ids = np.arange(devices)
    listed = hlo.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{}]*\})\}", attributes)
    if listed:
        return np.array([hlo.numbers(row) for row in re.findall(r"\{([\d,]+)\}", listed)])
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?)(?:,\s|$)", attributes):
        return _iota(iota[2]).reshape(hlo.numbers(iota[1]))
    if named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))?", attributes
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        ids = _iota(named[2]) if named[2] else ids
        used = hlo.search(r"^[^{]*\{([^}]*)\}", attributes[named.end() :])
        axes = re.findall(r"'(\w+)'", used)
        order = [name for name in sizes if name not in axes] + axes
        array = ids.reshape(list(sizes.values())).transpose([list(sizes).index(n) for n in order])
        return array.reshape(-1, math.prod(sizes[name] for name in axes))
    return ids.reshape(1, -1)


def _iota(text: str) -> np.ndarray:
    """Read `[2,4]T(1,0)`: 0, 1, 2, ... in that shape, then transposed."""
    shape, _, order = text.partition("T")
    dims = hlo.numbers(shape.strip("[]"))
    array = np.arange(math.prod(dims)).reshape(dims)
    return array.transpose(hlo.numbers(order.strip("()"))) if order else array
