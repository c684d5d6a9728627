"""Train a ladder of runs: models × teachers × samples seen × seeds (× trials of a sweep).

Each point has its own schedule, or is a cool-down branch from a parent run at a constant learning
rate (arXiv:2506.04598). A spec is a Python file with `get_ladder() -> LadderConfig`. A process of
`clip-jax train` trains each. FLOPs are counted; hours follow from an assumed MFU.
"""

import itertools
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from clip_jax import chips, flops, processes
from clip_jax.checkpoints.resume import branch_point, check_resumable
from clip_jax.checkpoints.retention import steps_in
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.config import Config
from clip_jax.config_files import complete, run_file, with_order
from clip_jax.errors import InputError, check_ranges, read_worker
from clip_jax.losses import TermConfig
from clip_jax.losses.objective import fitting
from clip_jax.models.clip import CLIPConfig
from clip_jax.optim import Constant, CoolDown, OptimConfig
from clip_jax.scaling import jobs
from clip_jax.scaling.queue import EVENTS, Afford, Job, Queue, Say
from clip_jax.scaling.run_table import gmacs, short
from clip_jax.serialize import from_dict, to_dict
from clip_jax.storage import files
from clip_jax.storage.events import Events
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import read_json


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """Hardware that trains a point, to estimate its hours."""

    chip: str = "TPU v5e"  # Name in chips.csv, or any name with peak_flops.
    chips: int = 1  # Number of chips that train one point together.
    mfu: float = 0.4  # Assumed MFU (0 to 1); `clip-jax plan` and `bench` have better figures.
    peak_flops: float | None = None  # FLOP/s of one chip. None: its dense bf16 peak in the table.
    start_seconds: float = 0.0  # Seconds per point for start, compilation and evaluation.

    def __post_init__(self) -> None:
        if self.peak_flops is None and self.chip not in chips.table():
            raise InputError(
                f"hardware.chip={self.chip!r} is not one of {', '.join(chips.table())}; use one of "
                "these, or set hardware.peak_flops."
            )
        check_ranges(
            self,
            "hardware.",
            chips="[1, inf)",
            mfu="(0, 1]",
            peak_flops="(0, inf)",
            start_seconds="[0, inf)",
        )

    def hours(self, training_flops: float) -> float:
        """Estimate the hours of one point; nothing else converts FLOPs to time."""
        peak = self.peak_flops or chips.table()[self.chip].peak_flops
        seconds = training_flops / (self.chips * peak * self.mfu) + self.start_seconds
        return seconds / 3600

    def estimate(self, points: "Sequence[Point]") -> dict[str, Any]:
        """Estimate the hours of sequential runs; returns JSON values with the assumptions."""
        hours = sum(self.hours(point.training_flops) for point in points)
        return {"chip": self.chip, "chips": self.chips, "mfu": self.mfu, "hours": hours}


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """Rules for a point's learning rate and warm-up, by its batch size, width and steps.

    The base config's learning rates are for its batch size and `reference_width`. A point's are
    base × (batch / base's batch)^batch_exponent × (width / reference_width)^width_exponent.
    """

    # Exponent of the batch size; 0.5 suits Adam (Malladi et al. 2022, arXiv:2205.10287).
    batch_exponent: float = 0.5
    reference_width: int = 768  # Image tower width that the base learning rate is for.
    width_exponent: float = 0.0  # Exponent of the width. 0: the same learning rate for all widths.
    max_warmup_share: float = 0.1  # Maximum warm-up, as a share of a run's steps.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "rules.",
            batch_exponent="(-inf, inf)",
            reference_width="[1, inf)",
            width_exponent="(-inf, inf)",
            max_warmup_share="[0, 1)",
        )

    def apply(self, base: Config, batch_size: int, width: int, steps: int) -> OptimConfig:
        """Return the optimizer config of one point."""
        factor = (batch_size / base.batch_size) ** self.batch_exponent
        factor *= (width / self.reference_width) ** self.width_exponent
        warmup_steps = min(base.optim.warmup_steps, int(self.max_warmup_share * steps))
        return replace(_scaled(base.optim, factor), warmup_steps=warmup_steps)


def _scaled(optim: OptimConfig, factor: float) -> OptimConfig:
    """Multiply the learning rates, and round them to three digits."""
    names = ("learning_rate", "final_learning_rate")
    return replace(optim, **{x: float(f"{getattr(optim, x) * factor:.3g}") for x in names})


@dataclass(frozen=True, kw_only=True)
class BranchesConfig:
    """Points as cool-down branches from one parent run for each model and seed.

    A parent run keeps the peak learning rate and evaluates nothing. A point equals, bit for bit, an
    uninterrupted run with that warmup-stable-decay (WSD) schedule.
    """

    share: float = 0.2  # Share of a point's steps in the cool-down.
    shape: Literal["linear", "sqrt", "power"] = "linear"  # Shape of the cool-down: see CoolDown.
    power: float = 1.0  # Exponent of the cool-down, used by the shape power.

    def __post_init__(self) -> None:
        check_ranges(self, "branches.", share="(0, 1)", power="(0, inf)")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of the trials of a point: one trial for every combination."""

    learning_rates: tuple[float, ...] = (1.0,)  # Learning rates, as multiples of the rules'.
    # Batch sizes; the number of steps changes to keep the samples. Empty: the point's own.
    batch_sizes: tuple[int, ...] = ()
    warmups: tuple[float, ...] = (1.0,)  # Numbers of warm-up steps, as multiples of the rules'.
    weight_decays: tuple[float, ...] = ()  # Weight decays. Empty: the base config's.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "sweep.",
            learning_rates="(0, inf)",
            batch_sizes="[2, inf)",
            warmups="[0, inf)",
            weight_decays="[0, inf)",
        )
        for name in ("learning_rates", "warmups", "batch_sizes", "weight_decays"):
            least = name in ("learning_rates", "warmups")
            _check_distinct(f"sweep.{name}", getattr(self, name), least)

    def trials(self, config: Config) -> Iterator[tuple[str, Config]]:
        """Yield a name suffix and a config for every combination at one batch size."""
        decays = self.weight_decays or (config.optim.weight_decay,)
        for factor, warmup, decay in itertools.product(self.learning_rates, self.warmups, decays):
            warmup_steps = round(warmup * config.optim.warmup_steps)
            if warmup_steps >= config.steps:
                raise InputError(
                    f"sweep.warmups={warmup:g} gives {warmup_steps} steps of warm-up in a run of "
                    f"{config.steps}; lower it or rules.max_warmup_share."
                )
            optim = _scaled(config.optim, factor)
            optim = replace(optim, warmup_steps=warmup_steps, weight_decay=decay)
            labels = [
                (self.learning_rates, f"rate{factor:g}"),
                (self.batch_sizes, f"batch{config.batch_size}"),
                (self.warmups, f"warmup{warmup:g}"),
                (decays, f"decay{decay:g}"),
            ]
            name = "".join(f"-{label}" for values, label in labels if len(values) > 1)
            yield name, replace(config, optim=optim)


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """A grid of runs, models × teachers × samples × seeds, that share a base config."""

    base: Config  # Shared config; points replace its model, steps, seeds and learning rates.
    models: Mapping[str, CLIPConfig]  # Models, by the name that their points get.
    samples: tuple[int, ...]  # Numbers of pairs seen, each in one point's complete schedule.
    # Objectives with teachers, by the name that is added to the model's; "" adds none. Empty: the
    # base's objective. A live teacher needs its `model`, to count its FLOPs.
    teachers: Mapping[str, tuple[TermConfig, ...]] = field(default_factory=dict)
    batch_sizes: tuple[int, ...] = ()  # Batch size for each of `samples`. Empty: the base's.
    seeds: tuple[int, ...] = (0,)  # Random seeds for parameters and data order.
    rules: RulesConfig = field(default_factory=RulesConfig)
    branches: BranchesConfig | None = None  # Cool-down branches. None: full schedules.
    sweep: SweepConfig | None = None  # Trials per point. None: one, by the rules.
    hardware: tuple[HardwareConfig, ...] = ()  # Hardware to estimate hours for, each on its own.

    def __post_init__(self) -> None:
        check_ranges(self, samples="[1, inf)", batch_sizes="[2, inf)", seeds="[0, 4294967295]")
        if self.base.double_batch_at or self.base.lengths:
            raise InputError("base.double_batch_at, lengths: points have one batch; remove both.")
        for name in ("models", "samples", "seeds"):
            _check_distinct(name, tuple(getattr(self, name)))
        if self.batch_sizes and len(self.batch_sizes) != len(self.samples):
            raise InputError(
                f"batch_sizes={self.batch_sizes} must have one for each of samples={self.samples}."
            )
        if self.branches and self.sweep:
            raise InputError("branches and sweep cannot be combined; remove one of them.")
        if self.branches and len(set(self.batch_sizes)) > 1:
            raise InputError(
                f"batch_sizes={self.batch_sizes} must be equal, or remove branches: they share one."
            )


def _check_distinct(name: str, values: tuple[Any, ...], least: int = 1) -> None:
    if len(set(values)) < max(least, len(values)):
        raise InputError(f"{name}={values} must have no value twice, and at least one.")


def load_ladder(path: str | Path) -> LadderConfig:
    """Run a spec's `get_ladder()`. Raises InputError if the file has none."""
    return run_file(Path(path), "get_ladder", LadderConfig)


class Point(NamedTuple):
    """One run of the ladder: a point, or the parent run of branches."""

    name: str  # w32@16K-seed0, w32-parent-seed0 or, in a sweep, w32@16K-rate0.5-seed0
    model: str  # and its teacher, as in w32+L
    samples: int  # as in the spec; the run sees complete batches
    config: Config
    workdir: AnyPath
    parent: str = ""  # name of the run that it branches from

    @property
    def samples_seen(self) -> int:
        return self.config.steps * self.config.batch_size

    @property
    def first_step(self) -> int:
        """The step of the parent run from which this run starts; 0 without a parent."""
        return branch_point(self.config.branch_from)[1] if self.config.branch_from else 0

    @property
    def training_flops(self) -> int:
        """FLOPs of the run's own steps, without the parent run's."""
        return flops.of_step(self.config).total * (self.config.steps - self.first_step)

    def is_ready(self) -> bool:
        """Return whether the checkpoint from which it starts exists."""
        if not self.config.branch_from:
            return True
        parent, step = branch_point(self.config.branch_from)
        return step in steps_in(files.as_path(parent) / "checkpoints")


def grid(ladder: LadderConfig, root: AnyPath) -> list[Point]:
    """Return every run of the ladder, with run directories under `root`."""
    points = []
    base, sweep = ladder.base, ladder.sweep or SweepConfig()
    own = ladder.batch_sizes or (base.batch_size,) * len(ladder.samples)
    sizes = [
        (samples, size, max(round(samples / size), 1))
        for samples, batch_size in zip(ladder.samples, own, strict=True)
        for size in sweep.batch_sizes or (batch_size,)
    ]
    shortest = min(steps for _, _, steps in sizes)
    objectives = ladder.teachers or {"": base.objective}
    for (model, architecture), teacher in itertools.product(ladder.models.items(), objectives):
        of_model, model = list[Point](), "+".join(filter(None, (model, teacher)))
        for samples, batch_size, steps in sizes:
            length = shortest if ladder.branches else steps  # branches share their warm-up
            one = replace(
                base,
                model=architecture,
                steps=steps,
                batch_size=batch_size,
                optim=ladder.rules.apply(base, batch_size, architecture.vision.width, length),
                objective=fitting(objectives[teacher], architecture),
            )
            for (trial, config), seed in itertools.product(sweep.trials(one), ladder.seeds):
                name = f"{model.replace('/', '-')}@{short(samples)}{trial}-seed{seed}"
                config = replace(config, seed=seed, data=replace(config.data, seed=seed))
                of_model.append(Point(name, model, samples, config, root / name))
        points += _with_parents(of_model, ladder.branches) if ladder.branches else of_model
    names = Counter(point.name for point in points)
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"points would share the names {twice}; samples are too close.")
    return points


def _with_parents(points: Sequence[Point], branches: BranchesConfig) -> list[Point]:
    """Turn a model's points into branches, preceded by the parent run of each seed."""
    made = []
    for seed in dict.fromkeys(point.config.seed for point in points):
        of_seed = [point for point in points if point.config.seed == seed]
        one, optim = of_seed[0], of_seed[0].config.optim
        workdir = one.workdir.with_name(f"{one.model.replace('/', '-')}-parent-seed{seed}")
        cooled, begin = [], []
        for point in of_seed:
            length = max(round(branches.share * point.config.steps), 1)
            schedule = CoolDown(steps=length, shape=branches.shape, power=branches.power)
            begin.append(point.config.steps - schedule.steps)
            if begin[-1] < max(optim.warmup_steps, 1):
                raise InputError(
                    f"{point.name} has {point.config.steps} steps: after a warm-up of "
                    f"{optim.warmup_steps}, none is left for the parent run with branches.share="
                    f"{branches.share}; use more samples, or a smaller batch_size or share."
                )
            config = replace(
                point.config,
                optim=replace(optim, schedule=schedule),
                branch_from=f"{workdir}@{begin[-1]}",
            )
            cooled.append(point._replace(config=config, parent=workdir.name))
        parent = replace(
            one.config,
            steps=max(begin),
            optim=replace(optim, schedule=Constant()),
            evals=(),
            checkpoint=replace(one.config.checkpoint, also=tuple(sorted(set(begin))), best=None),
        )
        samples = max(begin) * parent.batch_size
        made += [Point(workdir.name, one.model, samples, parent, workdir), *cooled]
    return made


def is_done(point: Point) -> bool:
    """Return whether a point is completely trained. InputError if its directory has another run."""
    workdir = point.workdir
    advice = f"Restore a copy, or delete {workdir} to train the point again."
    result = read_json(workdir / "result.json", advice=advice)
    if not (workdir / "checkpoints").exists() and not result:
        return False  # a config without a checkpoint may be replaced
    before = complete(read_run_config(workdir, recover=True))
    check_resumable(workdir, before, to_dict(point.config), point.config.samples_after)
    step = from_dict(int, result.get("step", 0), f"step in {workdir / 'result.json'}")
    return step >= point.config.end


@dataclass(frozen=True, kw_only=True)
class LadderCommand:
    """Train the unfinished runs of a ladder; run the command again to resume."""

    spec: Path  # Python file with get_ladder(), such as configs/ladder_digits.py.
    # Folder of the run directories and of the queue. None: runs/ and the spec's name.
    root: AnyPath | None = None
    only: str = "*"  # Pattern of the names of points to train, such as 'w32@*' or '*-seed0'.
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
    points = _chosen(complete_grid, command.only)
    done = {point.name for point in points if is_done(point)}
    missing = [point for point in points if point.name not in done]
    afford = _afford(ladder, complete_grid, command.limit)
    say(describe(points, done, ladder))
    failures, left_out, begun = dict[str, str](), list[str](), [*Events(f"{root}/{EVENTS}").newest]
    for point in missing:
        fits = point.parent not in left_out and afford([*begun, point.name])
        (begun if fits else left_out).append(point.name)
    if left_out:
        say(f"  the limit of {command.limit} leaves out {', '.join(left_out)}")
    if not command.dry_run:
        files.check_destination(root, "--root")
        runs = [_job(point, group) for point in missing]
        folder = root if files.is_remote(root) else Path(root).absolute()
        environment = {
            # Points that differ only in their seed share the compiled step.
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/compilation_cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            **os.environ,
        }
        if command.jobs:
            with Queue(root, runs, afford, group, say) as queue:
                jobs.run(queue, command.jobs, environment, say)
            failures, left_out = queue.failures, queue.left_out
            done |= {x.name for x in missing if x.name not in failures and is_done(x)}

    def numbers(some: Sequence[Point]) -> dict[str, Any]:
        return {
            "training_flops": sum(point.training_flops for point in some),
            "estimates": [kind.estimate(some) for kind in ladder.hardware],
        }

    listed = [
        {
            "name": point.name,
            "workdir": str(point.workdir),
            **numbers([point]),
            "samples_seen": point.samples_seen,
            "gmacs_per_sample": gmacs(point.config.model),
            "done": point.name in done,
            "failure": failures.get(point.name),
            "left_out": point.name in left_out,
        }
        for point in points
    ]
    totals = {"points": len(missing), **numbers(missing)}
    return {"root": str(root), "points": listed, "totals": totals}


def _chosen(points: Sequence[Point], only: str) -> list[Point]:
    """Return matching points and their parents, by cost: that of a parent is with its branches."""
    wanted = {point.name for point in points if fnmatch(point.name, only)}
    if not wanted:
        raise InputError(f"only={only!r} matches no point; the first is {points[0].name}.")
    wanted |= {point.parent for point in points if point.name in wanted}
    chosen, work = [point for point in points if point.name in wanted], Counter[str]()
    for point in chosen:
        for name in {point.name, point.parent}:
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
    config = with_order(point.config, workdir)  # an earlier start's order
    content = json.dumps(to_dict(config), indent=1)
    for path in {workdir / "config.json", directory / "config.json"}:  # only one on a disk
        if not (path.exists() and path.read_text() == content):  # others may be training it
            files.write_whole(path, content)
    train = [sys.executable, "-m", "clip_jax", "train"]
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
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in points:
        label = f"{point.model} parent" if ladder.branches and not point.parent else point.model
        groups.setdefault((label, point.samples), []).append(point)
    rows, total = list[dict[str, str]](), 0
    for (label, _), group in groups.items():
        point, config, work = group[0], group[0].config, group[0].training_flops
        total += sum(other.training_flops for other in group)
        new = {"new steps": f"{config.steps - point.first_step:,}"} if ladder.branches else {}
        rows.append(
            {
                "model": label,
                "pairs": short(point.samples_seen),
                "batch": f"{config.batch_size:,}",
                "steps": f"{config.steps:,}",
                **new,
                "learning rate": f"{config.optim.learning_rate:g}",
                "warm-up": f"{config.optim.warmup_steps:,}",
                "FLOPs per run": f"{work:.2e}",
                "cumulative": f"{total:.2e}",
                "runs": str(len(group)),
                "done": str(sum(other.name in done for other in group)),
                **{f"{x.chips} {x.chip}": f"{x.hours(work):,.2f} h" for x in ladder.hardware},
            }
        )
    table = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(map(str.rjust, cells, widths)) for cells in table]
    missing = [point for point in points if point.name not in done]
    work = sum(point.training_flops for point in missing)
    lines.append(f"{len(missing)} of {len(points)} runs are missing: {work:.2e} training FLOPs")
    lines += [
        f"  {kind.chips} {kind.chip} at an assumed {kind.mfu:.0%} of the peak: "
        f"{kind.estimate(missing)['hours']:,.2f} h in sequence"
        for kind in ladder.hardware
    ]
    if ladder.branches:
        branches = [point.config for point in points if point.parent]
        alone = sum(flops.of_step(config).total * config.steps for config in branches)
        together = sum(point.training_flops for point in points)
        lines.append(
            f"{together:.2e} FLOPs for all points with parent runs, {alone:.2e} with separate "
            f"runs: {1 - together / alone:.0%} saved."
        )
    return "\n".join(lines)
