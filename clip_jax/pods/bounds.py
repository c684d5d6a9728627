"""Bounds of the time of a training step, and the compiler's estimate of it.

The overlapped bound assumes that all work overlaps: it is the longest of compute, memory and links
at their peaks. The sequential bound assumes that a device runs one operation after the other, each
bound by its own compute or memory. The compiler estimate adds up cycles, without collectives.
"""

from collections.abc import Sequence

from clip_jax.metrics.chips import Chip
from clip_jax.pods.work import Work

# Bytes/s between slices, per chip and direction. Google's pages on v5e and v6e state it per pod of
# 256 chips (6.4 and 25.6 Tbit/s); for other chips it is not known.
NETWORK = {"TPU v5e": 3.125e9, "TPU v6e": 12.5e9}
LIMITS = ("compute", "memory", "interconnect", "network")  # resources that work at the same time


# Seconds of a step or a part of it: `compute`, `memory`, `interconnect` (within a slice or node),
# `network` (between them), `operations` (run sequentially, each bound by compute or memory) and
# `compiler` (its estimate). None: not known.
Seconds = dict[str, float | None]


def times(chip: Chip, works: Sequence[Work]) -> Seconds:
    """Divide work by a device's peaks. Asynchronous copies overlap with other operations."""
    peak, bandwidth = chip.peak_flops / chip.devices, chip.hbm_bandwidth / chip.devices
    memory = sum(x.times * x.bytes for x in works) / bandwidth
    compute = operations = estimate = None
    counted = [(x, x.flops) for x in works if x.flops is not None]
    if len(counted) == len(works):
        compute = sum(x.times * flops for x, flops in counted) / peak
        shown = [
            x.times * max(flops / peak, x.bytes / bandwidth) for x, flops in counted if not x.hidden
        ]
        operations = max(sum(shown), memory)
    cycles = [x.times * x.cycles for x in works if x.cycles is not None]
    if chip.clock and len(cycles) == len(works):
        estimate = sum(cycles) / chip.clock
    return {
        "compute": compute, "memory": memory, "operations": operations, "compiler": estimate
    }  # fmt: skip


def bounds(
    chip: Chip, works: Sequence[Work], interconnect_bytes: int, network_bytes: int
) -> Seconds:
    """Bound the resources' times in a step.

    Args:
      chip: its peaks; `interconnect_bandwidth` counts both directions, half of it inwards.
      works: operations of one JAX device; a chip has `chip.devices` of them.
      interconnect_bytes: bytes that one device receives within its slice or node.
      network_bytes: bytes that one device receives from other slices or nodes.
    """
    inwards = chip.interconnect_bandwidth and chip.interconnect_bandwidth / 2 / chip.devices
    network = NETWORK.get(chip.name)
    return times(chip, works) | {
        "interconnect": interconnect_bytes / inwards if inwards else None,
        "network": network_bytes and network and network_bytes * chip.devices / network,
    }


def step_seconds(seconds: Seconds) -> Seconds:
    """Return the two bounds and the estimate of a step, by their names in `plan --json`."""
    overlapped = max(seconds[name] or 0.0 for name in LIMITS)
    operations = seconds["operations"]
    return {
        "bound": overlapped,
        "sequential_bound": operations and max(overlapped, operations),
        "compiler_estimate": seconds["compiler"],
    }


def by_part(chip: Chip, works: Sequence[Work]) -> dict[str, Seconds]:
    """Return the times of each part of a step, the longest first."""
    names = dict.fromkeys(x.part for x in works)
    parts = {name: times(chip, [x for x in works if x.part == name]) for name in names}
    return dict(
        sorted(parts.items(), key=lambda item: -(item[1]["operations"] or item[1]["memory"] or 0))
    )
