"""Format plans as tables for a terminal."""

from collections.abc import Sequence

import numpy as np

from clip_jax.display import table
from clip_jax.pods.bounds import LIMITS
from clip_jax.pods.plan import BOUNDS, Plan

# Columns of the table of seconds. `network` is the one between slices or nodes.
SECONDS = {name: name for name in (*LIMITS, "operations", "schedule", "cost model")}
SECONDS |= {"memory": "HBM with padding", "operations": "sequential"}
SHARE = ", the part of a card that JAX takes (XLA_PYTHON_CLIENT_MEM_FRACTION)"
MFU = f"MFU: {' / '.join(label for label, _ in BOUNDS.values())}"
SLOW = ", which stores the scores: `short` needs heads of at least 64 channels and more VMEM"
IMAGE_BYTES = 70e3  # typical JPEG of 640 x 480 pixels
BLOCK_BYTES = 4 << 20  # bytes per request with shuffle blocks

HOW = {
    **dict.fromkeys(("parameters", "optimizer", "terms", "batch"), "exact, from the shardings"),
    "loss": "the loss compiled alone",
    "activations and workspace": "peak of the compiled step minus the above",
    "total": "peak of the compiled step",
}


def describe(plan: Plan) -> str:
    """Format a plan's memory, collectives, times and cost."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    rows = plan.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    gigabytes = plan.bytes_per_device["total"] / 1e9
    lines = [
        f"{plan.name}: {plan.devices} devices, mesh {mesh}, batch {plan.batch_size:,} ({rows} per "
        f"shard), remat {plan.remat}, {plan.form} loss, {plan.versions}",
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {gigabytes:.2f} GB of "
        f"{plan.hbm_bytes / 1e9:.1f} GB per device" + (SHARE if plan.is_gpu else ""),
    ]
    if plan.fit_compiles:
        lines.append(
            f"Best setting ({plan.fit_compiles} compiles): --model.remat {plan.remat} "
            f"--batch-size {plan.batch_size}"
        )
    calls = table(("kernel or library", "calls per step"), plan.calls.items())
    for tower, backend in plan.attention.items():
        tokens = f", {plan.tokens:,} patches" if tower == "image" else ""
        slow = "" if plan.is_gpu or backend != "xla" else SLOW
        lines.append(f"attention of the {tower} tower{tokens}: {backend}{slow}")
    lines += [_memory(plan), _collectives(plan), calls, _seconds(plan), _lengths(plan)]
    lines.append(
        f"model FLOPs: {plan.model_flops_per_step:.4g} per step, "
        f"{plan.model_flops_per_step / plan.devices:.4g} per device"
    )
    if plan.teacher_flops_per_step:
        share = plan.teacher_flops_per_step / plan.model_flops_per_step
        lines.append(f"of these, teacher: {plan.teacher_flops_per_step:.4g} per step, {share:.1%}")
    if plan.is_gpu and plan.seconds:
        lines.append(
            "HBM traffic counts every operand; those that are still in a card's cache cost less."
        )
    for bound, (label, sign) in BOUNDS.items() if plan.seconds else ():
        seconds, mfu = plan.step_seconds[bound], plan.mfus[bound]
        value = "not known" if mfu is None else f"{seconds:.4f} s, MFU {sign} {mfu:.1%}"
        lines.append(f"{label}: {value}")
    if total := plan.seconds.get("schedule"):
        known = sorted(plan.unscheduled.items(), key=lambda item: -item[1])
        shares = [f"{name} {x / total:.1%}" for name, x in known if x >= 0.0005 * total]
        lines.append(
            "of the schedule estimate, from XLA's cost model for want of a schedule: "
            + (", ".join(shares) or "less than 0.1%")
        )
    if plan.seconds and plan.valid_share < 1:
        valid = _percent(plan.mfus, plan.valid_share)
        lines.append(f"MFU of valid patches ({plan.valid_share:.1%} of all): {valid}")
    cost = "" if plan.price is None else f", price {plan.price:,.0f}"
    lines.append(
        f"{plan.steps:,} steps, {plan.steps * plan.batch_size / 1e9:.3g}B pairs, "
        f"at {plan.mfu:.0%} MFU ({plan.mfu_source}): {plan.hours:,.1f} hours{cost}"
    )
    each = plan.per_billion_pairs()
    for name in ("", "_without_teacher") if plan.teacher_flops_per_step else ("",):
        cost = "" if each["price"] is None else f", price {each[f'price{name}']:,.0f}"
        lines.append(f"1B pairs{name.replace('_', ' ')}: {each[f'hours{name}']:,.2f} hours{cost}")
    images = plan.images_per_second_per_host
    size, requests = images * IMAGE_BYTES / 1e6, images * IMAGE_BYTES / BLOCK_BYTES
    lines.append(
        f"each host reads {images:,.0f} images/s: at {IMAGE_BYTES / 1e3:.0f} kB each, {size:,.0f} "
        f"MB/s in {requests:,.1f} requests/s to a bucket"
    )
    return "\n".join(filter(None, lines))


def compare(plans: Sequence[Plan]) -> str:
    """Format plans as a table with one row each."""
    rows = []
    for x in plans:
        known = {name: x.seconds[name] or 0.0 for name in LIMITS if x.seconds}
        seconds = x.step_seconds["bound"]
        fits = "yes" if x.fits else "no"
        rows.append(
            (
                x.name,
                "×".join(map(str, x.mesh.values())),
                x.remat,
                f"{fits}: {x.bytes_per_device['total'] / 1e9:.2f} of {x.hbm_bytes / 1e9:.0f}",
                "" if seconds is None else f"{seconds:.4f}",
                _percent(x.mfus) if x.fits else "",
                max(known, key=lambda name: known[name], default=""),
                f"{x.hours:,.1f}",
                "" if x.price is None else f"{x.price:,.0f}",
            )
        )
    names = ("topology", "mesh", "remat", "fits: GB", "s/step ≥", MFU, "limit", "hours", "price")
    return table(names, rows, left=3)


def _lengths(plan: Plan) -> str:
    """Format the plans of a run's batch sizes and sequence lengths, one row each."""
    rows = []
    for x in plan.lengths:
        seconds, bound = x.step_seconds["bound"], {"bound": x.mfus["bound"]}
        rows.append(
            (
                x.tokens,
                f"{1 - x.valid_share:.1%}",
                f"{x.batch_size:,}",
                f"{x.steps:,}",
                x.attention.get("image", ""),
                f"{'yes' if x.fits else 'no'}: {x.bytes_per_device['total'] / 1e9:.2f}",
                "" if seconds is None else f"{seconds:.4f}",
                _percent(x.mfus),
                _percent(bound, x.valid_share),
                f"{x.compile_seconds:.0f}",
            )
        )
    names = (
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


def _percent(mfus: dict[str, float | None], share: float = 1.0) -> str:
    return " / ".join("–" if x is None else f"{x * share:.1%}" for x in mfus.values())


def _memory(plan: Plan) -> str:
    rows = []
    for name, size in plan.bytes_per_device.items():
        label = f"optimizer, {plan.optimizer}" if name == "optimizer" else name
        rows.append((label, HOW[name], _mib(size)))
        if size := plan.token_embedding_bytes.get(name):
            rows.append(("  of it, the token embedding", HOW[name], _mib(size)))
        if name == "terms" and plan.frozen_bytes:
            rows.append(("  of it, frozen weights", HOW[name], _mib(plan.frozen_bytes)))
    return table(("memory per device", "source", "MiB"), rows, left=2)


def _collectives(plan: Plan) -> str:
    """Format collectives, summed by kind, axes and part of the step; small ones in one row."""
    sums: dict[tuple[str, str, str], np.ndarray] = {}
    for x in plan.collectives:
        key = (x.kind, " × ".join(x.axes), x.part)
        received = x.received + x.received_from_slices
        counts = (x.times, x.bytes, received, 0 if x.overlapped else received)
        sums[key] = sums.get(key, 0) + np.array(counts)
    least = sum(counts[2] for counts in sums.values()) / 200
    large = {key: counts for key, counts in sums.items() if counts[2] >= least}
    rows = sorted(large.items(), key=lambda item: -item[1][2])
    if small := [counts for key, counts in sums.items() if key not in large]:
        rows.append((("others", "", ""), np.sum(small, axis=0)))
    names = (
        "collective",
        "axis",
        "part of the step",
        "times",
        "MiB",
        "MiB received",
        "not overlapped",
    )
    texts = [(*key, times, *map(_mib, sizes)) for key, (times, *sizes) in rows]
    return table(names, texts, left=3)


def _seconds(plan: Plan) -> str:
    """Format the seconds of each part of the step, and of the step."""
    parts = plan.seconds_by_part | ({"the step": plan.seconds} if plan.seconds else {})
    texts = [
        {name: "not known" if x is None else f"{x:.4f}" for name, x in seconds.items()}
        for seconds in parts.values()
    ]
    rows = [
        (part, *(x.get(name, "") for name in SECONDS)) for part, x in zip(parts, texts, strict=True)
    ]
    return table(("seconds at the peaks", *SECONDS.values()), rows)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f}"
