"""The exchanges between devices in a compiled step, read from its HLO."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from clip_jax.pods import hlo

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One exchange between devices, as often as a step does it."""

    kind: str  # one of KINDS
    shapes: tuple[
        hlo.Shape, ...
    ]  # of the result on one device; of a reduce-scatter, of the operand
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


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A collective as a plan tells it: what it is for, and bytes of one device a step."""

    kind: str
    axes: tuple[str, ...]
    part: str  # of the step
    times: int
    bytes: int
    received: int
    received_from_slices: int  # or from other nodes


def exchanges(text: str, mesh: Mapping[str, int], slices: int = 1) -> list[Exchange]:
    """List the collectives of a step as `collectives` does, with what they are for."""
    return [
        Exchange(
            kind=x.kind, axes=x.axes, part=_part(x.source), times=x.times, bytes=x.bytes,
            received=x.received, received_from_slices=x.received_from_slices,
        )
        for x in collectives(text, mesh, slices)
    ]  # fmt: skip


def _part(source: str) -> str:
    direction = "backward" if "transpose(" in source else "forward"
    if "/visual" in source:
        return f"image tower, {direction}"
    if "/text" in source:
        return f"text tower, {direction}"
    if "jvp(" in source:
        return f"loss, {direction}"
    return "update" if source else "unnamed"  # by the compiler


def collectives(text: str, mesh: Mapping[str, int], slices: int = 1) -> list[Collective]:
    """List the collectives of a step, the largest first.

    Args:
      text: optimised HLO, `compiled.as_text()`.
      mesh: axis -> size, in the order of the devices.
      slices: into how many slices (joined by a slower network) the devices fall, in order.
    """
    devices = math.prod(mesh.values())
    exchanges: dict[tuple[object, ...], Collective] = {}
    computations, entry = hlo.parse(text)
    for visit in hlo.walk(computations, entry):
        for x in visit.computation.values():
            if between := re.search(r'_xla_megascale_transfer_type="(\w+)"', x.attributes):
                # Over the network from the same chip of every other slice, which lie along data.
                if x.opcode == "recv":
                    exchanges[visit.name, x.name] = Collective(
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
            times = min(visit.times, exchanges[key].times) if key in exchanges else visit.times
            exchanges[key] = Collective(
                kind, shapes, _axes(groups, mesh), groups.shape[1],
                len(np.unique(groups[0] * slices // devices)), times,
                x.source or visit.source,
            )  # fmt: skip
    moving = [x for x in exchanges.values() if x.group_size > 1]
    return sorted(moving, key=lambda x: (-x.received, x.kind, x.source))


def _moved(x: hlo.Instruction, kind: str, computation: hlo.Computation) -> tuple[hlo.Shape, ...]:
    if kind == "reduce-scatter":
        return tuple(hlo.Shape(*s[:2]) for o in x.operands for s in computation[o].shapes)
    shapes = x.shapes
    if x.opcode == "all-gather-start":  # (operands, results)
        shapes = shapes[len(shapes) // 2 :]
    if x.opcode == "collective-permute-start":  # (operand, result, contexts)
        shapes = shapes[1:2]
    return tuple(hlo.Shape(*shape[:2]) for shape in shapes)  # however they lie


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
