"""Train the runs of a ladder, each by a process of `clip-jax train`."""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from clip_jax import parts, processes
from clip_jax.config_files import as_begun
from clip_jax.errors import InputError, check_ranges, read_worker
from clip_jax.scaling import jobs
from clip_jax.scaling.grid import Point, grid, is_done
from clip_jax.scaling.ladder import LadderConfig, load_ladder
from clip_jax.scaling.queue import EVENTS, Afford, Job, Queue, Say
from clip_jax.scaling.run_table import gmacs, short
from clip_jax.serialize import to_dict
from clip_jax.storage import files
from clip_jax.storage.events import Events
from clip_jax.storage.files import AnyPath


@dataclass(frozen=True, kw_only=True)
class LadderCommand:
    """Train the unfinished runs of a ladder; run the command again to resume."""

    spec: Path  # Python file with get_ladder(), such as configs/ladder_digits.py.
    # Folder of the run directories and of the queue. None: runs/ and the spec's name.
    root: AnyPath | None = None
    only: str = "*"  # Pattern of the names of points to train, such as 'w32@*' or '*-seed0'.
    # Patterns of the names of points to leave out, such as those to predict first: 'w64@98K*'.
    leave_out: tuple[str, ...] = ()
    jobs: int = 1  # Number of points to train at once on this machine. 0: only write configs.
    # Limit of the study's estimated cost: training FLOPs (1e21), or chip-hours of the spec's first
    # hardware (500chip-hours). No point starts that would exceed it. None: no limit.
    limit: str | None = None
    # Number of this host among those that train each point together, such as 1/4. Empty: as in the
    # environment that JAX reads, if it names the processes of a run.
    host: str = ""
    group: str = ""  # Name of the group of hosts that train each point together, for --host.
    dry_run: bool = False  # Only print the table of points.

    def __post_init__(self) -> None:
        check_ranges(self, jobs="[0, inf)")


def climb(command: LadderCommand, say: Say) -> dict[str, Any]:
    """Print the table of points, write their configs, and train the unfinished ones.

    Returns JSON values: `points` in the order of the queue, and `totals` of the unfinished ones.
    Raises jobs.Stopped after SIGTERM or Ctrl-C.
    """
    ladder = load_ladder(command.spec)
    root = command.root or Path("runs") / command.spec.stem
    group = _group(command)
    complete_grid = grid(ladder, root)
    points = _chosen(complete_grid, command.only, command.leave_out)
    done = {point.name for point in points if is_done(point)}
    missing = [point for point in points if point.name not in done]
    afford = _afford(ladder, complete_grid, command.limit)
    say(describe(points, done, ladder))
    failures: dict[str, str] = {}
    left_out = _left_out(missing, afford, root)
    if left_out:
        say(f"  the limit of {command.limit} leaves out {', '.join(left_out)}")
    if not command.dry_run:
        files.check_destination(root, "--root")
        runs = [_job(point, group) for point in missing]
        if command.jobs:
            with Queue(root, runs, afford, group, say) as queue:
                jobs.run(queue, command.jobs, _environment(root), say)
            failures = queue.failures
            left_out = queue.left_out
            done |= {x.name for x in missing if x.name not in failures and is_done(x)}
    listed = [
        {
            "name": point.name,
            "workdir": str(point.workdir),
            **_costs([point], ladder),
            "samples_seen": point.samples_seen,
            "gmacs_per_sample": gmacs(point.config.model),
            "done": point.name in done,
            "failure": failures.get(point.name),
            "left_out": point.name in left_out,
        }
        for point in points
    ]
    totals = {"points": len(missing), **_costs(missing, ladder)}
    return {"root": str(root), "points": listed, "totals": totals}


def _left_out(missing: Sequence[Point], afford: Afford, root: AnyPath) -> list[str]:
    """Return the names of unfinished points that the limit leaves out, with their branches."""
    begun = [*Events(f"{root}/{EVENTS}").newest]
    left_out: list[str] = []
    for point in missing:
        if point.parent not in left_out and afford([*begun, point.name]):
            begun.append(point.name)
        else:
            left_out.append(point.name)
    return left_out


def _environment(root: AnyPath) -> dict[str, str]:
    """Return the environment of the processes that train."""
    folder = root if files.is_remote(root) else Path(root).absolute()
    return {
        # Points that differ only in their seed share the compiled step.
        "JAX_COMPILATION_CACHE_DIR": f"{folder}/compilation_cache",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **os.environ,
    }


def _costs(points: Sequence[Point], ladder: LadderConfig) -> dict[str, Any]:
    """Return the FLOPs of points, and estimates of their hours, as JSON values."""
    work = [point.training_flops for point in points]
    return {
        "training_flops": sum(work),
        "estimates": [hardware.estimate(work) for hardware in ladder.hardware],
    }


def _chosen(points: Sequence[Point], only: str, leave_out: Sequence[str]) -> list[Point]:
    """Return matching points and their parents, by cost: that of a parent is with its branches."""
    names = {point.name for point in points if fnmatch(point.name, only)}
    if not names:
        raise InputError(f"only={only!r} matches no point; the first is {points[0].name}.")
    for pattern in leave_out:
        matching = {point.name for point in points if fnmatch(point.name, pattern)}
        if not matching:
            raise InputError(f"leave_out={pattern!r} matches no point, such as {points[0].name}.")
        names -= matching
    if not names:
        raise InputError(f"leave_out={list(leave_out)} leaves out every point; omit a pattern.")
    names |= {point.parent for point in points if point.name in names}
    chosen = [point for point in points if point.name in names]
    work = Counter[str]()
    for point in chosen:
        for name in dict.fromkeys((point.name, point.parent)):
            work[name] += point.training_flops
    return sorted(chosen, key=lambda point: -work[point.name])


def _afford(ladder: LadderConfig, points: Sequence[Point], limit: str | None) -> Afford:
    """Return the check that points with all that are done stay within the limit."""
    if limit is None:
        return lambda _: True
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+)?)(|chip-hours)", limit)
    if not match or float(match[1]) == float("inf"):
        raise InputError(f"limit={limit!r} must be training FLOPs such as 1e21, or 500chip-hours.")
    if match[2] and not ladder.hardware:
        raise InputError(f"limit={limit!r} needs hardware=(HardwareConfig(...),) in the spec.")
    costs = {point.name: float(point.training_flops) for point in points}
    if match[2]:
        first = ladder.hardware[0]
        costs = {name: first.chips * first.hours(work) for name, work in costs.items()}
    done = [point.name for point in points if is_done(point)]
    most = float(match[1]) * (1 + 1e-9)  # sums have rounding errors
    return lambda names: sum(costs.get(name, 0.0) for name in {*done, *names}) <= most


def _group(command: LadderCommand) -> processes.Position:
    """Return the group of this host, as the command or else the environment names it."""
    group = processes.position()
    if command.host and not command.group:
        raise InputError(f"host={command.host!r} needs the name of its group: add --group NAME.")
    if command.host:
        group = processes.Position(command.group, *read_worker(command.host, "host"))
    if group.count > 1 and command.jobs > 1:
        raise InputError(f"jobs={command.jobs} must be 1 where {group.count} hosts train a point.")
    return group


def _job(point: Point, group: processes.Position) -> Job:
    """Write the config of a point, unless it has it, and return the job that trains it."""
    workdir = point.workdir
    remote = files.is_remote(workdir)
    directory = files.beside(workdir, "ladder") if remote else Path(workdir)
    config = as_begun(point.config, workdir)  # an earlier start's order
    values = to_dict(config)
    content = json.dumps(values, indent=1)
    for path in dict.fromkeys(x / "config.json" for x in (workdir, directory)):  # one on a disk
        if not (path.exists() and path.read_text() == content):  # others may be training it
            files.write_whole(path, content)
    train = [sys.executable, "-m", "clip_jax", *parts.flags(values), "train"]
    return Job(
        name=point.name,
        command=[*train, f"{directory}/config.json", "--workdir", str(workdir)],
        workdir=workdir,
        log=directory / (f"log-{group.index}.txt" if group.index else "log.txt"),
        is_done=(lambda: True) if group.index else partial(is_done, point),
        after=point.parent,
        is_ready=point.is_ready,
    )


def describe(points: Sequence[Point], done: set[str], ladder: LadderConfig) -> str:
    """Format points, in the order of the queue, with a line per model and number of samples."""
    missing = [point for point in points if point.name not in done]
    work = [point.training_flops for point in missing]
    lines = _table(points, done, ladder)
    lines.append(
        f"{len(missing)} of {len(points)} runs are missing: {sum(work):.2e} training FLOPs"
    )
    for hardware in ladder.hardware:
        hours = hardware.estimate(work)["hours"]
        lines.append(
            f"  {hardware.chips} {hardware.chip} at an assumed {hardware.mfu:.0%} of the peak: "
            f"{hours:,.2f} h in sequence"
        )
    if ladder.branches:
        branches = [point.config for point in points if point.parent]
        alone = sum(config.flops_after(config.steps) for config in branches)
        together = sum(point.training_flops for point in points)
        lines.append(
            f"{together:.2e} FLOPs for all points with parent runs, {alone:.2e} with separate "
            f"runs: {1 - together / alone:.0%} saved."
        )
    return "\n".join(lines)


def _table(points: Sequence[Point], done: set[str], ladder: LadderConfig) -> list[str]:
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        label = f"{point.model} parent" if ladder.branches and not point.parent else point.model
        groups.setdefault((label, point.samples), []).append(point)
    rows: list[dict[str, str]] = []
    cumulative = 0
    for (label, _), group in groups.items():
        point = group[0]
        config = point.config
        work = point.training_flops
        cumulative += sum(other.training_flops for other in group)
        row = {
            "model": label,
            "pairs": short(point.samples_seen),
            "batch": f"{config.batch_size:,}",
            "steps": f"{config.steps:,}",
        }
        if ladder.branches:
            row["new steps"] = f"{config.steps - point.first_step:,}"
        row |= {
            "learning rate": f"{config.optim.learning_rate:g}",
            "warm-up": f"{config.optim.warmup_steps:,}",
            "FLOPs per run": f"{work:.2e}",
            "cumulative": f"{cumulative:.2e}",
            "runs": str(len(group)),
            "done": str(sum(other.name in done for other in group)),
        }
        for hardware in ladder.hardware:
            row[f"{hardware.chips} {hardware.chip}"] = f"{hardware.hours(work):,.2f} h"
        rows.append(row)
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return ["  ".join(map(str.rjust, cells, widths)) for cells in table]
