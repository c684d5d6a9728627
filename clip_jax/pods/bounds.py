"""Bounds of the time of a training step, and two estimates of it for TPUs.

The overlapped bound assumes that all work overlaps: it is the longest of compute, memory and links
at their peaks. The sequential bound assumes that a device runs one operation after the other, each
bound by its own compute or memory. The schedule estimate does the same with the cycles that the
compiler scheduled, and adds the collectives beside which nothing runs. The cost model is XLA's own
estimate of cycles, which is far too high for the vector unit; it leaves out collectives.
"""

import math
from collections.abc import Sequence

from clip_jax.chips import Chip
from clip_jax.pods.collectives import Collective
from clip_jax.pods.work import Work

LIMITS = ("compute", "memory", "interconnect", "network")  # resources that work at the same time


# Seconds of a step or a part of it: `compute`, `memory`, `interconnect` (within a slice or node),
# `network` (between them), `operations` (run sequentially, each bound by compute or memory),
# `schedule` and `cost model` (the estimates). None: not known.
Seconds = dict[str, float | None]


def times(device: Chip, works: Sequence[Work], collectives: Sequence[Collective] = ()) -> Seconds:
    """Divide work by a device's peaks, and add up its schedules. Asynchronous copies overlap."""
    peak, bandwidth = device.peak_flops, device.hbm_bandwidth
    memory = sum(x.times * x.bytes for x in works) / bandwidth
    compute = operations = schedule = cost_model = None
    if all(x.flops is not None for x in works):
        compute = sum(x.times * (x.flops or 0) for x in works) / peak
        shown = [x for x in works if not x.hidden]
        least = [x.times * max((x.flops or 0) / peak, x.bytes / bandwidth) for x in shown]
        operations = max(sum(least), memory)
    if device.clock and all(x.cycles is not None for x in works):
        cost_model = sum(x.times * (x.cycles or 0) for x in works) / device.clock
        exposed = [x for x in collectives if not x.overlapped]
        schedule = max(sum(x.times * seconds(device, x) for x in works), memory)
        schedule += sum(_links(device, exposed))
    return {
        "compute": compute,
        "memory": memory,
        "operations": operations,
        "schedule": schedule,
        "cost model": cost_model,
    }


def seconds(device: Chip, x: Work) -> float:
    """Return the time of one execution by its schedule, and at least that of HBM and matrix unit.

    It is 0 for an operation beside which others run, and for collectives, which are timed by their
    links. Without a schedule, the cost model's cycles take its place.
    """
    if x.hidden or x.part == "collectives" or not device.clock:
        return 0.0
    cycles = x.schedule if x.schedule is not None else x.cycles or 0
    return max(
        max(cycles, x.matrix) / device.clock,
        x.bytes / device.hbm_bandwidth,
        (x.flops or 0) / device.peak_flops,
    )


def unscheduled(device: Chip, works: Sequence[Work]) -> dict[str, float]:
    """Return the opcodes of operations without a schedule, and their seconds in the estimate."""
    result: dict[str, float] = {}
    for x in works:
        if x.schedule is None and (time := x.times * seconds(device, x)):
            result[x.opcode] = result.get(x.opcode, 0.0) + time
    return result


def _links(device: Chip, collectives: Sequence[Collective]) -> tuple[float, float]:
    """Return the seconds of collectives on the links of a slice or node, and between these."""
    inwards = (device.interconnect_bandwidth or math.inf) / 2
    network = device.network_bandwidth or math.inf
    return (
        sum(x.received for x in collectives) / inwards,
        sum(x.received_from_slices for x in collectives) / network,
    )


def bounds(device: Chip, works: Sequence[Work], collectives: Sequence[Collective]) -> Seconds:
    """Bound the resources' times in a step, and estimate the step's.

    Args:
      device: its peaks (`Chip.device`); half of `interconnect_bandwidth` is inwards.
      works: its operations.
      collectives: its collectives.
    """
    links, network = _links(device, collectives)
    between = any(x.received_from_slices for x in collectives)
    return times(device, works, collectives) | {
        "interconnect": links if device.interconnect_bandwidth else None,
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
    device: Chip, works: Sequence[Work], collectives: Sequence[Collective]
) -> dict[str, Seconds]:
    """Return the times of each part of a step, the longest first."""
    parts = {}
    for name in dict.fromkeys(x.part for x in works):
        parts[name] = times(
            device,
            [x for x in works if x.part == name],
            collectives if name == "collectives" else (),
        )
    return dict(
        sorted(parts.items(), key=lambda item: -(item[1]["operations"] or item[1]["memory"] or 0))
    )
