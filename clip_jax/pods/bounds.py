"""Bounds of the time of a training step, and two estimates of it for TPUs.

The overlapped bound assumes that all work overlaps: it is the longest of compute, memory and links
at their peaks. The sequential bound assumes that a device runs one operation after the other, each
bound by its own compute or memory. The schedule estimate does the same with the cycles that the
compiler scheduled, and adds the collectives beside which nothing runs. The cost model is XLA's own
estimate of cycles, which is far too high for the vector unit; it leaves out collectives.
"""

import math
from collections.abc import Sequence

from clip_jax.metrics.chips import Chip
from clip_jax.pods.collectives import Collective
from clip_jax.pods.work import Work

# Bytes/s between slices, per chip and direction. Google's pages on v5e and v6e state it per pod of
# 256 chips (6.4 and 25.6 Tbit/s); for other chips it is not known.
NETWORK = {"TPU v5e": 3.125e9, "TPU v6e": 12.5e9}
LIMITS = ("compute", "memory", "interconnect", "network")  # resources that work at the same time


# Seconds of a step or a part of it: `compute`, `memory`, `interconnect` (within a slice or node),
# `network` (between them), `operations` (run sequentially, each bound by compute or memory),
# `schedule` and `cost model` (the estimates). None: not known.
Seconds = dict[str, float | None]


def times(chip: Chip, works: Sequence[Work], collectives: Sequence[Collective] = ()) -> Seconds:
    """Divide work by a device's peaks, and add up its schedules. Asynchronous copies overlap."""
    peak, bandwidth = chip.peak_flops / chip.devices, chip.hbm_bandwidth / chip.devices
    memory = sum(x.times * x.bytes for x in works) / bandwidth
    compute = operations = schedule = cost_model = None
    if all(x.flops is not None for x in works):
        compute = sum(x.times * (x.flops or 0) for x in works) / peak
        shown = [x for x in works if not x.hidden]
        least = [x.times * max((x.flops or 0) / peak, x.bytes / bandwidth) for x in shown]
        operations = max(sum(least), memory)
    if chip.clock and all(x.cycles is not None for x in works):
        cost_model = sum(x.times * (x.cycles or 0) for x in works) / chip.clock
        exposed = [x for x in collectives if not x.overlapped]
        schedule = max(sum(x.times * seconds(chip, x) for x in works), memory)
        schedule += sum(_links(chip, exposed))
    return {
        "compute": compute,
        "memory": memory,
        "operations": operations,
        "schedule": schedule,
        "cost model": cost_model,
    }


def seconds(chip: Chip, x: Work) -> float:
    """Return the time of one execution by its schedule, and at least that of HBM and matrix unit.

    It is 0 for an operation beside which others run, and for collectives, which are timed by their
    links. Without a schedule, the cost model's cycles take its place.
    """
    if x.hidden or x.part == "collectives" or not chip.clock:
        return 0.0
    cycles = x.schedule if x.schedule is not None else x.cycles or 0
    return max(
        max(cycles, x.matrix) / chip.clock,
        x.bytes / chip.hbm_bandwidth * chip.devices,
        (x.flops or 0) / chip.peak_flops * chip.devices,
    )


def unscheduled(chip: Chip, works: Sequence[Work]) -> dict[str, float]:
    """Return the opcodes of operations without a schedule, and their seconds in the estimate."""
    result: dict[str, float] = {}
    for x in works:
        if x.schedule is None and (time := x.times * seconds(chip, x)):
            result[x.opcode] = result.get(x.opcode, 0.0) + time
    return result


def _links(chip: Chip, collectives: Sequence[Collective]) -> tuple[float, float]:
    """Return the seconds of collectives on the links of a slice or node, and between these."""
    inwards = (chip.interconnect_bandwidth or math.inf) / 2 / chip.devices
    network = NETWORK.get(chip.name, math.inf) / chip.devices
    return (
        sum(x.received for x in collectives) / inwards,
        sum(x.received_from_slices for x in collectives) / network,
    )


def bounds(chip: Chip, works: Sequence[Work], collectives: Sequence[Collective]) -> Seconds:
    """Bound the resources' times in a step, and estimate the step's.

    Args:
      chip: its peaks; `interconnect_bandwidth` counts both directions, half of it inwards.
      works: operations of one JAX device; a chip has `chip.devices` of them.
      collectives: collectives of one device.
    """
    links, network = _links(chip, collectives)
    between = any(x.received_from_slices for x in collectives)
    return times(chip, works, collectives) | {
        "interconnect": links if chip.interconnect_bandwidth else None,
        "network": (network or None) if between else 0,
    }


def step_seconds(seconds: Seconds) -> Seconds:
    """Return the two bounds and the two estimates of a step, by their names in `plan --json`."""
    overlapped = max(seconds[name] or 0.0 for name in LIMITS)
    operations, schedule = seconds["operations"], seconds["schedule"]
    return {
        "bound": overlapped,
        "sequential_bound": operations and max(overlapped, operations),
        "schedule_estimate": schedule and max(overlapped, schedule),
        "cost_model": seconds["cost model"],
    }


def by_part(
    chip: Chip, works: Sequence[Work], collectives: Sequence[Collective]
) -> dict[str, Seconds]:
    """Return the times of each part of a step, the longest first."""
    parts = {}
    for name in dict.fromkeys(x.part for x in works):
        own = collectives if name == "collectives" else ()
        parts[name] = times(chip, [x for x in works if x.part == name], own)
    return dict(
        sorted(parts.items(), key=lambda item: -(item[1]["operations"] or item[1]["memory"] or 0))
    )
