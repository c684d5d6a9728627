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

from clip_jax.scaling.plots import STYLE

SECONDS = {
    "compute": "compute",
    "memory": "HBM",
    "interconnect": "interconnect",
    "network": "between slices",
}
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
    hbm_bytes: float  # of one device
    bytes_per_device: dict[str, int]  # by part, and the total
    model_flops_per_step: int  # of all devices, nothing recomputed
    collectives: list[dict[str, Any]]
    seconds: dict[str, float | None]  # the least time of each part; None: not known
    step_seconds_bound: float | None
    mfu_bound: float | None
    steps: int
    mfu: float  # what hours and price assume
    hours: float
    price: float | None
    by_formula: bool  # nothing was compiled
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
        f"{plan.hbm_bytes / 1e9:.1f} GB a device",
    ]
    if plan.by_formula:
        lines.append(
            "By formula, nothing compiled: parameters, optimizer and batch are exact, activations "
            "and collectives are estimates, HBM traffic is not known."
        )
    if plan.fit_compiles:
        lines.append(
            f"Found with {plan.fit_compiles} compiles: --model.remat {plan.remat} "
            f"--batch-size {plan.batch_size}"
        )
    tables = [_memory(plan)]
    if plan.collectives:
        tables.append(_collectives(plan))
    if plan.seconds:
        tables.append(_times(plan))
    end = [
        f"model FLOPs: {plan.model_flops_per_step:.4g} a step, "
        f"{plan.model_flops_per_step / plan.devices:.4g} a device",
    ]
    if plan.mfu_bound is not None:
        end.append(
            f"a step takes at least {plan.step_seconds_bound:.4f} s: MFU ≤ {plan.mfu_bound:.1%}"
        )
    cost = "" if plan.price is None else f", price {plan.price:,.0f}"
    end.append(
        f"{plan.steps:,} steps, {plan.steps * plan.batch_size / 1e9:.3g}B pairs, "
        f"at {plan.mfu:.0%} MFU: {plan.hours:,.1f} hours{cost}"
    )
    return "\n".join([*lines, *map(_text, tables), *end])


def compare(plans: Sequence[Plan]) -> str:
    """One row a plan."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("topology", "mesh", "remat", "fits", "GB", "of", "s/step ≥", "MFU ≤", "limit"):
        table.add_column(name, justify="left" if name in ("topology", "mesh", "remat") else "right")
    table.add_column("hours", justify="right")
    table.add_column("price", justify="right")
    for x in plans:
        known = {name: t for name, t in x.seconds.items() if t is not None}
        table.add_row(
            x.name + (" (formula)" if x.by_formula else ""),
            "×".join(map(str, x.mesh.values())),
            x.remat,
            "yes" if x.fits else "no",
            f"{x.bytes_per_device['total'] / 1e9:.2f}",
            f"{x.hbm_bytes / 1e9:.0f}",
            "" if x.step_seconds_bound is None else f"{x.step_seconds_bound:.4f}",
            "" if x.mfu_bound is None else f"{x.mfu_bound:.1%}",
            SECONDS[max(known, key=lambda name: known[name])] if known else "memory",
            f"{x.hours:,.1f}",
            "" if x.price is None else f"{x.price:,.0f}",
        )
    return _text(table)


def _memory(plan: Plan) -> Table:
    table = Table("memory of a device", "MiB", "how it is known", box=box.SIMPLE_HEAD)
    table.columns[1].justify = "right"
    for name, size in plan.bytes_per_device.items():
        how = HOW[name]
        if plan.by_formula and name in ("loss", "activations and workspace", "total"):
            how = "by formula"
        table.add_row(name, f"{size / 2**20:,.1f}", how)
    return table


def _collectives(plan: Plan) -> Table:
    """Collectives joined by kind, axes and part of the step; the smallest in one row."""
    joined: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for x in plan.collectives:
        entry = joined[(x["kind"], " × ".join(x["axes"]), x["part"])]
        entry[0] += x["times"]
        entry[1] += x["bytes"]
        entry[2] += x["received"] + x["received_from_slices"]
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
    for name, seconds in plan.seconds.items():
        if seconds != 0:
            table.add_row(SECONDS[name], "not known" if seconds is None else f"{seconds:.4f}")
    return table


def _text(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=110).print(table)
    return stream.getvalue().rstrip()


def draw(plans: Sequence[Plan], path: Path) -> None:
    """Draw time and memory by part, one bar a plan. The suffix chooses the format."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        page = Figure(figsize=(7, 1.2 + 0.6 * len(plans)), layout="constrained")
        left, right = page.subplots(1, 2, sharey=True)
        names = [f"{x.name}\n{'×'.join(map(str, x.mesh.values()))}" for x in plans]
        for place, plan in enumerate(plans):
            start = 0.0
            for i, (name, size) in enumerate(plan.bytes_per_device.items()):
                if name != "total":
                    label = name if place == 0 else None
                    right.barh(place, size / 1e9, left=start, color=f"C{i}", label=label)
                    start += size / 1e9
            right.plot([plan.hbm_bytes / 1e9] * 2, [place - 0.4, place + 0.4], color="black")
            height = 0.8 / len(SECONDS)
            for i, (name, label) in enumerate(SECONDS.items()):
                seconds = plan.seconds.get(name) or 0
                left.barh(
                    place - 0.4 + height * (i + 0.5), seconds, height, color=f"C{i + 5}",
                    label=label if place == 0 else None,
                )  # fmt: skip
        left.set_yticks(range(len(plans)), names)
        left.invert_yaxis()
        left.set_xlabel("seconds a step, at the peaks")
        right.set_xlabel("GB a device; the line: what it has")
        for axes in (left, right):
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.35), ncols=2, fontsize=7)
        page.savefig(path)
