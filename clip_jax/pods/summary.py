"""Format plans as tables for a terminal."""

from collections.abc import Iterator, Sequence

import numpy as np

from clip_jax.display import table
from clip_jax.pods.bounds import LIMITS
from clip_jax.pods.plan import BOUNDS, Memory, Plan, Speed
from clip_jax.pods.topology import Topology

# Columns of the table of seconds. `network` is the one between slices or nodes.
SECONDS = {name: name for name in (*LIMITS, "operations", "schedule", "cost model")}
SECONDS |= {"memory": "HBM with padding", "operations": "sequential"}
SHARE = ", the part of a card that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION)"
MFU = f"MFU: {' / '.join(label for label, _ in BOUNDS.values())}"
SLOW = ", which stores the scores: `short` needs heads of at least 64 channels and more VMEM"
SHORT = 0.01  # seconds of a step below which milliseconds are printed
IMAGE_BYTES = 70e3  # typical JPEG of 640 x 480 pixels
BLOCK_BYTES = 4 << 20  # bytes per request with shuffle blocks

HOW = {
    **dict.fromkeys(("parameters", "optimizer", "terms", "batch"), "exact, from the shardings"),
    "loss": "estimated from the loss alone",
    "activations and workspace": "peak of the compiled step minus the above",
    "total": "peak of the compiled step",
}
ESTIMATED = {
    "activations and workspace": "the estimate minus the above",
    "total": "estimated from the traced step",
}


def describe(plan: Plan) -> str:
    """Format a plan's memory, collectives, times and cost."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    memory, gigabytes = plan.memory, plan.memory.bytes_per_device["total"] / 1e9
    slice_name = Topology.parse(plan.name).accelerator_type
    name = f"{plan.name} ({slice_name})" if slice_name else plan.name
    form = f"{plan.form} loss, " if plan.form else ""  # a caption loss has one form
    lines = [
        f"{name}: {plan.devices} devices, mesh {mesh}, batch {plan.batch_size:,} "
        f"({plan.rows} per shard), remat {plan.remat}, {form}{plan.versions}",
        f"{'fits' if memory.fits else 'DOES NOT FIT'}: {gigabytes:.2f} GB of "
        f"{memory.hbm_bytes / 1e9:.1f} GB per device" + (SHARE if plan.is_gpu else ""),
    ]
    if plan.is_estimate:
        lines.append(
            "Estimated without the compiler: collectives, and padding in memory, are left out. The "
            "plan without --estimate is exact."
        )
    if plan.fit_compiles:
        lines.append(
            f"Best setting ({plan.fit_compiles} compiles): --model.remat {plan.remat} "
            f"--batch-size {plan.batch_size}"
        )
    for tower, backend in plan.attention.items():
        tokens = f", {plan.tokens:,} patches" if tower == "image" else ""
        slow = "" if plan.is_gpu or backend != "xla" else SLOW
        lines.append(f"attention of the {tower} tower{tokens}: {backend}{slow}")
    calls = table(("kernel or library", "calls per step"), plan.speed.calls.items())
    lines += [_memory(plan), _collectives(plan.speed), calls, _seconds(plan.speed), _lengths(plan)]
    lines += [*_speed(plan), *_cost(plan)]
    return "\n".join(filter(None, lines))


def _speed(plan: Plan) -> Iterator[str]:
    """Format the FLOPs, bounds and estimates of a step, one per line."""
    speed = plan.speed
    flops, of_teacher = speed.model_flops_per_step, speed.teacher_flops_per_step
    yield f"model FLOPs: {flops:.4g} per step, {flops / plan.devices:.4g} per device"
    if of_teacher:
        yield f"of these, teacher: {of_teacher:.4g} per step, {of_teacher / flops:.1%}"
    if not speed.seconds:
        return
    if plan.is_gpu:
        yield (
            "HBM traffic counts every operand; those that are still in a card's cache cost less. "
            "Where HBM is the limit, the MFU may be higher than its bounds."
        )
    for bound, (label, sign) in BOUNDS.items():
        seconds, mfu = speed.step_seconds[bound], speed.mfus[bound]
        sign = "≈" if plan.is_estimate else sign
        value = "not known"
        if seconds is not None and mfu is not None:
            value = f"{_time(seconds)}, MFU {sign} {mfu:.1%}"
        yield f"{label}: {value}"
    if total := speed.seconds["schedule"]:
        longest = sorted(speed.unscheduled.items(), key=lambda item: -item[1])
        shares = [f"{name} {x / total:.1%}" for name, x in longest if x >= 0.0005 * total]
        yield (
            "of the schedule estimate, from XLA's cost model since they have no schedule: "
            + (", ".join(shares) or "less than 0.1%")
        )
    if speed.valid_share < 1:
        valid = _percent(speed.mfus, speed.valid_share)
        yield f"MFU of valid patches ({speed.valid_share:.1%} of all): {valid}"


def _cost(plan: Plan) -> Iterator[str]:
    """Format the hours and the price of the run, and what its hosts read."""
    cost, price = plan.cost, "" if plan.cost.price is None else f", price {plan.cost.price:,.0f}"
    yield (
        f"{cost.steps:,} steps, {cost.steps * plan.batch_size / 1e9:.3g}B pairs, "
        f"at {cost.mfu:.0%} MFU ({cost.mfu_source}): {cost.hours:,.1f} hours{price}"
    )
    each = plan.per_billion_pairs()
    for name in ("", "_without_teacher") if plan.speed.teacher_flops_per_step else ("",):
        price = "" if each["price"] is None else f", price {each[f'price{name}']:,.0f}"
        yield f"1B pairs{name.replace('_', ' ')}: {each[f'hours{name}']:,.2f} hours{price}"
    images = cost.images_per_second_per_host
    size, requests = images * IMAGE_BYTES / 1e6, images * IMAGE_BYTES / BLOCK_BYTES
    yield (
        f"each host reads {images:,.0f} images/s: at {IMAGE_BYTES / 1e3:.0f} kB each, {size:,.0f} "
        f"MB/s in {requests:,.1f} requests/s to a bucket"
    )


def compare(plans: Sequence[Plan]) -> str:
    """Format plans as a table with one row each."""
    rows = []
    for x in plans:
        limits = {name: x.speed.seconds[name] or 0.0 for name in LIMITS if x.speed.seconds}
        seconds, price = x.speed.step_seconds["bound"], x.cost.price
        rows.append(
            (
                x.name,
                "×".join(map(str, x.mesh.values())),
                x.remat,
                f"{_fits(x.memory)} of {x.memory.hbm_bytes / 1e9:.0f}",
                "" if seconds is None else _decimals(seconds),
                _percent(x.speed.mfus) if x.memory.fits else "",
                max(limits, key=lambda name: limits[name], default=""),
                f"{x.cost.hours:,.1f}",
                "" if price is None else f"{price:,.0f}",
            )
        )
    names = ("topology", "mesh", "remat", "fits: GB", "s/step ≥", MFU, "limit", "hours", "price")
    return table(names, rows, left=3)


def _lengths(plan: Plan) -> str:
    """Format the plans of a run's stages, batch sizes and sequence lengths, one row each."""
    rows = []
    for x in plan.lengths:
        seconds, bound = x.speed.step_seconds["bound"], {"bound": x.speed.mfus["bound"]}
        rows.append(
            (
                x.stage or 1,
                x.tokens,
                f"{1 - x.speed.valid_share:.1%}",
                f"{x.batch_size:,}",
                f"{x.cost.steps:,}",
                x.attention.get("image", ""),
                _fits(x.memory),
                "" if seconds is None else _decimals(seconds),
                _percent(x.speed.mfus),
                _percent(bound, x.speed.valid_share),
                f"{x.compile_seconds:.0f}",
            )
        )
    names = (
        "stage",
        "tokens",
        "padded",
        "batch",
        "steps",
        "attention",
        "fits: GB",
        "s/step ≥",
        "MFU",
        "valid",
        "compile, s",
    )
    return table(names, rows, left=0)


def _fits(memory: Memory) -> str:
    """Format whether a step fits, and its gigabytes."""
    return f"{'yes' if memory.fits else 'no'}: {memory.bytes_per_device['total'] / 1e9:.2f}"


def _percent(mfus: dict[str, float | None], share: float = 1.0) -> str:
    return " / ".join("–" if x is None else f"{x * share:.1%}" for x in mfus.values())


def _memory(plan: Plan) -> str:
    rows = []
    sources = HOW | ESTIMATED if plan.is_estimate else HOW
    for name, size in plan.memory.bytes_per_device.items():
        label = f"optimizer, {plan.optimizer}" if name == "optimizer" else name
        rows.append((label, sources[name], _mib(size)))
        if size := plan.memory.token_embedding_bytes.get(name):
            rows.append(("  of it, the token embedding", sources[name], _mib(size)))
        if name == "terms" and plan.memory.frozen_bytes:
            rows.append(("  of it, frozen weights", sources[name], _mib(plan.memory.frozen_bytes)))
    return table(("memory per device", "source", "MiB"), rows, left=2)


def _collectives(speed: Speed) -> str:
    """Format collectives, summed by kind, axes and part of the step; small ones in one row."""
    sums: dict[tuple[str, str, str], np.ndarray] = {}
    for x in speed.collectives:
        key = (x.kind, " × ".join(x.axes), x.part)
        received = x.received + x.received_from_slices
        counts = (x.times, x.bytes, received, 0 if x.overlapped else received)
        sums[key] = sums.get(key, 0) + np.array(counts)
    least = sum(counts[2] for counts in sums.values()) / 200
    large = {key: counts for key, counts in sums.items() if counts[2] >= least}
    rows = sorted(large.items(), key=lambda item: -item[1][2])
    if small := [counts for key, counts in sums.items() if key not in large]:
        rows.append((("others", "", ""), np.sum(small, axis=0)))
    integers = [(key, counts.tolist()) for key, counts in rows]
    names = (
        "collective",
        "axis",
        "part of the step",
        "times",
        "MiB",
        "MiB received",
        "not overlapped",
    )
    texts = [(*key, times, *map(_mib, sizes)) for key, (times, *sizes) in integers]
    return table(names, texts, left=3)


def _seconds(speed: Speed) -> str:
    """Format the seconds of each part of the step, and of the step."""
    parts = dict(speed.seconds_by_part)
    if speed.seconds:
        parts["the step"] = speed.seconds
    longest = max((x or 0.0 for seconds in parts.values() for x in seconds.values()), default=0.0)
    unit, scale = ("seconds", 1.0) if longest >= SHORT else ("milliseconds", 1e3)
    texts = [
        {name: "not known" if x is None else f"{scale * x:.4f}" for name, x in seconds.items()}
        for seconds in parts.values()
    ]
    rows = [
        (part, *(x.get(name, "") for name in SECONDS)) for part, x in zip(parts, texts, strict=True)
    ]
    return table((f"{unit} at the peaks", *SECONDS.values()), rows)


def _time(seconds: float) -> str:
    return f"{seconds:.4f} s" if seconds >= SHORT else f"{1e3 * seconds:.4f} ms"


def _decimals(seconds: float) -> str:
    return f"{seconds:.4f}" if seconds >= SHORT else f"{seconds:.2g}"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
