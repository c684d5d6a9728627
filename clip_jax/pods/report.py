"""What a run takes on a pod, as numbers, tables and a picture."""

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from clip_jax.display import STYLE, plain
from clip_jax.pods.exchanges import Exchange

SECONDS = {
    "compute": "compute",
    "memory": "HBM, whole tiles",
    "interconnect": "interconnect",
    "network": "between slices or nodes",
}
SHARE = ", of the card's what JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION)"
IMAGE_BYTES = 70e3  # a JPEG of 640 x 480
BLOCK_BYTES = 4 << 20  # one request, in the order of blocks

HOW = {
    "parameters": "exact, from the shardings",
    "optimizer": "exact, from the shardings",
    "batch": "exact, from the shardings",
    "loss": "the loss compiled alone",
    "activations and workspace": "peak of the compiled step minus the above",
    "total": "peak of the compiled step",
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One config on one pod."""

    name: str  # of the topology
    fits: bool
    devices: int
    mesh: dict[str, int]
    batch_size: int
    remat: str
    form: str  # of the loss
    optimizer: str  # its name
    hbm_bytes: float  # of one device, that a run may use
    is_gpu: bool
    bytes_per_device: dict[str, int]  # by part, and the total
    words: dict[str, int]  # of parameters and optimizer, the token embedding table
    model_flops_per_step: int  # of all devices, nothing recomputed
    collectives: tuple[Exchange, ...]
    calls: dict[str, int]  # of kernels and libraries in a step, by name
    seconds: dict[str, float | None]  # the least time of each part; None: not known
    seconds_by_part: dict[str, dict[str, float | None]]  # of the step, compute and memory apart
    gigabytes: float  # that a device reads from and writes to HBM, padding included
    step_seconds_bound: float | None  # all overlaps
    step_seconds_one_by_one: float | None  # operation by operation
    step_seconds_compiler: float | None  # its estimate
    mfu_bound: float | None
    mfu_one_by_one: float | None
    mfu_compiler: float | None
    steps: int
    mfu: float  # what hours and price assume
    hours: float
    images_per_second_per_host: float  # that it must read and decode
    decoded_per_second_per_host: float | None  # that it can, as measured; None: not given
    price: float | None
    versions: str
    compile_seconds: float
    fit_compiles: int = 0  # how many were needed to find batch and remat

    def to_json(self) -> dict[str, Any]:
        """Return everything, and model FLOPs per device."""
        return asdict(self) | {
            "model_flops_per_step_per_device": self.model_flops_per_step / self.devices
        }


def describe(plan: Plan) -> str:
    """Tables of memory, collectives and times, and what the run costs."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    rows = plan.batch_size // (plan.mesh["data"] * plan.mesh["fsdp"])
    gigabytes = plan.bytes_per_device["total"] / 1e9
    lines = [
        f"{plan.name}: {plan.devices} devices, mesh {mesh}, batch {plan.batch_size:,} ({rows} a "
        f"shard), remat {plan.remat}, {plan.form} loss, {plan.versions}",
        f"{'fits' if plan.fits else 'DOES NOT FIT'}: {gigabytes:.2f} GB of "
        f"{plan.hbm_bytes / 1e9:.1f} GB a device" + (SHARE if plan.is_gpu else ""),
    ]
    if plan.fit_compiles:
        lines.append(
            f"Found with {plan.fit_compiles} compiles: --model.remat {plan.remat} "
            f"--batch-size {plan.batch_size}"
        )
    tables = [_memory(plan)]
    if plan.collectives:
        tables.append(_collectives(plan))
    if plan.calls:
        tables.append(_calls(plan))
    if plan.seconds:
        tables += [_parts(plan), _times(plan)]
    end = [
        f"model FLOPs: {plan.model_flops_per_step:.4g} a step, "
        f"{plan.model_flops_per_step / plan.devices:.4g} a device",
    ]
    if plan.is_gpu and plan.seconds:
        end.append("HBM is counted for every operand; what a card's cache still holds costs less.")
    end += [
        f"{name}: {'not known' if seconds is None else f'{seconds:.4f} s, MFU {sign} {mfu:.1%}'}"
        for name, sign, seconds, mfu in figures(plan)
        if plan.seconds
    ]
    cost = "" if plan.price is None else f", price {plan.price:,.0f}"
    end.append(
        f"{plan.steps:,} steps, {plan.steps * plan.batch_size / 1e9:.3g}B pairs, "
        f"at {plan.mfu:.0%} MFU: {plan.hours:,.1f} hours{cost}"
    )
    end.append(reading(plan.images_per_second_per_host, plan.decoded_per_second_per_host))
    return "\n".join([*lines, *map(_text, tables), *end])


def reading(images: float, decoded: float | None) -> str:
    """What a host's input must do a second, and whether its cores can."""
    requests = images * IMAGE_BYTES / BLOCK_BYTES
    line = (
        f"a host reads {images:,.0f} images/s: of {IMAGE_BYTES / 1e3:.0f} kB each, "
        f"{images * IMAGE_BYTES / 1e6:,.0f} MB/s in {requests:,.1f} requests/s of a bucket"
    )
    if decoded is None:
        return f"{line} (--decoded compares it with what bench input measured)"
    verdict = "enough" if decoded >= images else "TOO FEW: the devices will wait"
    return f"{line}; its cores decode {decoded:,.0f}: {verdict}"


def figures(plan: Plan) -> list[tuple[str, str, float | None, float | None]]:
    """Name what is known of a step's time: what it is, a sign, seconds and MFU."""
    return [
        ("hard bound, all overlapping", "≤", plan.step_seconds_bound, plan.mfu_bound),
        ("bound operation by operation", "≤", plan.step_seconds_one_by_one, plan.mfu_one_by_one),
        ("the compiler's estimate", "≈", plan.step_seconds_compiler, plan.mfu_compiler),
    ]


def compare(plans: Sequence[Plan]) -> str:
    """One row a plan."""
    table = Table(box=box.SIMPLE_HEAD)
    columns = ("topology", "mesh", "remat", "fits", "GB", "s/step ≥")
    for name in (*columns, "MFU ≤", "1 by 1 ≤", "cycles ≈", "limit"):
        table.add_column(name, justify="left" if name in columns[:3] else "right")
    table.add_column("hours", justify="right")
    table.add_column("price", justify="right")
    for x in plans:
        known = {name: x.seconds.get(name) or 0.0 for name in SECONDS}
        table.add_row(
            x.name,
            "×".join(map(str, x.mesh.values())),
            x.remat,
            "yes" if x.fits else "no",
            f"{x.bytes_per_device['total'] / 1e9:.2f} of {x.hbm_bytes / 1e9:.0f}",
            "" if x.step_seconds_bound is None else f"{x.step_seconds_bound:.4f}",
            *("" if mfu is None else f"{mfu:.1%}" for *_, mfu in figures(x)),
            max(known, key=lambda name: known[name]) if x.fits else "",
            f"{x.hours:,.1f}",
            "" if x.price is None else f"{x.price:,.0f}",
        )
    return _text(table)


def _memory(plan: Plan) -> Table:
    table = Table("memory of a device", "MiB", "how it is known", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for name, size in plan.bytes_per_device.items():
        label = f"optimizer, {plan.optimizer}" if name == "optimizer" else name
        table.add_row(label, f"{size / 2**20:,.1f}", HOW[name])
        if name in plan.words:
            table.add_row("  of it, words", f"{plan.words[name] / 2**20:,.1f}", HOW[name])
    return table


def _collectives(plan: Plan) -> Table:
    """Collectives joined by kind, axes and part of the step; the smallest in one row."""
    joined: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for x in plan.collectives:
        entry = joined[(x.kind, " × ".join(x.axes), x.part)]
        entry[0] += x.times
        entry[1] += x.bytes
        entry[2] += x.received + x.received_from_slices
    whole = sum(entry[2] for entry in joined.values())
    table = Table("collective", "axis", "part of the step", "times", "MiB", "MiB received")
    table.box = box.SIMPLE_HEAD
    small = [0, 0, 0]
    for column in table.columns[3:]:
        column.justify = "right"
    for (kind, axes, part), entry in sorted(joined.items(), key=lambda item: -item[1][2]):
        if entry[2] * 200 < whole:
            small = [a + b for a, b in zip(small, entry, strict=True)]
        else:
            table.add_row(kind, axes, part, *_megabytes(entry))
    if small[0]:
        table.add_row("others", "", "", *_megabytes(small))
    return table


def _megabytes(entry: list[int]) -> list[str]:
    return [str(entry[0]), *(f"{size / 2**20:,.1f}" for size in entry[1:])]


def _times(plan: Plan) -> Table:
    table = Table("at the peaks", "seconds a step", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for name, what in SECONDS.items():
        if plan.seconds[name] != 0:
            table.add_row(what, _seconds(plan.seconds[name]))
    return table


def _seconds(seconds: float | None) -> str:
    return "not known" if seconds is None else f"{seconds:.4f}"


def _calls(plan: Plan) -> Table:
    table = Table("kernel or library", "calls a step", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for name, times in plan.calls.items():
        table.add_row(name, str(times))
    return table


def _parts(plan: Plan) -> Table:
    """Where the time goes: each part of the step by its own operations."""
    columns = ("compute", "memory", "operations", "compiler")
    names = ("part of the step", "s at compute's peak", "at HBM's", "one by one", "compiler")
    table = Table(*names, box=box.SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, parts in plan.seconds_by_part.items():
        table.add_row(name, *(_seconds(parts[column]) for column in columns))
    return table


def _text(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(table)
    return stream.getvalue().rstrip()


def draw(plans: Sequence[Plan], path: Path) -> None:
    """Draw where time and memory go, by part: two bars a plan of time, one of memory.

    The upper bar of time is the bound operation by operation, the lower one the compiler's
    estimate. The suffix chooses the format.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        page = Figure(figsize=(8, 1.6 + 0.7 * len(plans)), layout="constrained")
        left, right = page.subplots(1, 2, sharey=True)
        names = [f"{plain(x.name)}\n{'×'.join(map(str, x.mesh.values()))}" for x in plans]
        parts = list(dict.fromkeys(part for x in plans for part in x.seconds_by_part))
        for place, plan in enumerate(plans):
            sizes = {k: v / 1e9 for k, v in plan.bytes_per_device.items() if k != "total"}
            _bar(right, place, sizes, list(sizes), 0.8)
            right.plot([plan.hbm_bytes / 1e9] * 2, [place - 0.4, place + 0.4], color="black")
            for shift, figure in ((-0.2, "operations"), (0.2, "compiler")):
                seconds = {k: v[figure] or 0.0 for k, v in plan.seconds_by_part.items()}
                _bar(left, place + shift, seconds, parts, 0.38)
        left.set_yticks(range(len(plans)), names)
        left.invert_yaxis()
        left.set_xlabel("s a step: one by one; below, the compiler's estimate")
        right.set_xlabel("GB a device; the line: what it has")
        for axes in (left, right):
            handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            axes.legend(
                handles.values(), handles.keys(), loc="lower center", bbox_to_anchor=(0.5, 1.0),
                ncols=3, fontsize=6,
            )  # fmt: skip
        page.savefig(path)


def _bar(axes: Any, place: float, sizes: dict[str, float], order: list[str], height: float) -> None:
    start = 0.0
    for number, name in enumerate(order):
        if size := sizes.get(name, 0.0):
            axes.barh(place, size, height, left=start, color=f"C{number % 10}", label=name)
            start += size
