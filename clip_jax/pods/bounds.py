"""How long a training step takes at least, and how long the compiler thinks: three figures.

The hard bound: all work overlaps, so the longest of compute, memory and links at their peaks. The
bound operation by operation: a device takes one after the other, each at least as long as its own
compute or memory. The estimate: the compiler's cycles, without exchanges.
"""

from collections.abc import Sequence
from typing import NamedTuple

from clip_jax.chips import Chip
from clip_jax.pods.work import Work

# Per chip and direction, bytes/s, between slices: Google's pages on v5e and v6e give it per pod of
# 256 chips (6.4 and 25.6 Tbit/s). Not known of the others.
NETWORK = {"TPU v5e": 3.125e9, "TPU v6e": 12.5e9}


class Bounds(NamedTuple):
    """Seconds of one step by part; None: not known."""

    compute: float | None
    memory: float
    interconnect: float | None
    network: float | None
    operations: float | None  # one after the other, each its own longer part
    compiler: float | None  # its estimate

    @property
    def step(self) -> float:
        """The step takes no less, however its parts overlap."""
        return max(x for x in self[:4] if x is not None)

    @property
    def one_by_one(self) -> float | None:
        """Nor less than this, since a device takes its operations one after the other."""
        return self.operations and max(self.step, self.operations)


class Seconds(NamedTuple):
    """What one part of a step takes; None: a kernel that doesn't say."""

    compute: float | None
    memory: float
    operations: float | None
    compiler: float | None


def seconds(chip: Chip, works: Sequence[Work]) -> Seconds:
    """Divide work by a device's peaks. Copies beside other operations fill what these leave."""
    peak, bandwidth = chip.peak_flops / chip.devices, chip.hbm_bandwidth / chip.devices
    memory = sum(x.times * x.bytes for x in works) / bandwidth
    known = [(x, x.flops) for x in works if x.flops is not None]
    is_known = len(known) == len(works)
    compute = sum(x.times * flops for x, flops in known) / peak
    shown = [(x.times, flops / peak, x.bytes / bandwidth) for x, flops in known if not x.hidden]
    operations = sum(times * max(parts) for times, *parts in shown)
    cycles = [(x.times, x.cycles) for x in works if x.cycles is not None]
    estimate = None
    if chip.clock and len(cycles) == len(works):
        estimate = sum(times * count for times, count in cycles) / chip.clock
    return Seconds(
        compute=compute if is_known else None,
        memory=memory,
        operations=max(operations, memory) if is_known else None,
        compiler=estimate,
    )


def bounds(
    chip: Chip, works: Sequence[Work], interconnect_bytes: int | None, network_bytes: int
) -> Bounds:
    """Bound a step.

    Args:
      chip: peaks; `interconnect_bandwidth` is of both directions together, half of it inwards.
      works: of one JAX device, of which `chip.devices` make a chip.
      interconnect_bytes: that one device receives within its slice or node.
      network_bytes: that one device receives from others.
    """
    inwards = chip.interconnect_bandwidth and chip.interconnect_bandwidth / 2 / chip.devices
    network = NETWORK.get(chip.name)
    whole = seconds(chip, works)
    return Bounds(
        compute=whole.compute,
        memory=whole.memory,
        interconnect=None if interconnect_bytes is None or not inwards
        else interconnect_bytes / inwards,
        network=0.0 if not network_bytes else network and network_bytes * chip.devices / network,
        operations=whole.operations,
        compiler=whole.compiler,
    )  # fmt: skip


def by_part(chip: Chip, works: Sequence[Work]) -> dict[str, Seconds]:
    """Say what each part of a step takes, the longest first."""
    names = dict.fromkeys(x.part for x in works)
    parts = {name: seconds(chip, [x for x in works if x.part == name]) for name in names}
    return dict(sorted(parts.items(), key=lambda item: -(item[1].operations or item[1].memory)))
