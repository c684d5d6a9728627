"""A ladder of runs: models × samples seen × seeds.

Each point has a whole schedule of its own, or is a short cool-down from one run of its model at a
constant rate, the trunk (arXiv:2506.04598). A spec is a Python file with
`get_ladder() -> LadderConfig`. Every point of the grid becomes an ordinary run: a `config.json` in
its own work directory, trained by `clip-jax train` as a process. The FLOPs are counted, the hours
follow from a stated MFU, the price from a stated rate.
"""

import itertools
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax import flops
from clip_jax.checkpoints.resume import branch_point, check_resumable
from clip_jax.checkpoints.retention import steps_in
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.config import Config, complete, run_file, with_order
from clip_jax.errors import InputError, check_ranges, read_part
from clip_jax.losses.objective import fitting
from clip_jax.models.clip import CLIPConfig
from clip_jax.optim import Constant
from clip_jax.scaling import jobs
from clip_jax.scaling.price import HardwareConfig, duration, in_words
from clip_jax.scaling.rules import BranchesConfig, RulesConfig
from clip_jax.scaling.sweep import SweepConfig
from clip_jax.scaling.table import gmacs, short
from clip_jax.serialize import from_dict, to_dict
from clip_jax.storage.files import check_destination, write_whole
from clip_jax.storage.json_files import read_json

# ------------------------------------------------------------------ the spec


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """Models × samples × seeds. What the points share is an ordinary config."""

    base: Config  # data, loss, evaluations, optimizer; model, steps, seeds and rates are replaced
    models: Mapping[str, CLIPConfig]  # by the name that its points get
    samples: tuple[int, ...]  # pairs seen, over the whole of one point's schedule
    batch_sizes: tuple[int, ...] = ()  # one for each of `samples`; none: the base's for all
    seeds: tuple[int, ...] = (0,)  # of the parameters and of the data's order
    rules: RulesConfig = field(default_factory=RulesConfig)
    branches: BranchesConfig | None = None  # None: each point over the base's own schedule
    sweep: SweepConfig | None = None  # None: one trial a point, by the rules
    hardware: tuple[HardwareConfig, ...] = ()  # to estimate for, one after the other

    def __post_init__(self) -> None:
        check_ranges(
            self, samples="[1, inf)", batch_sizes="[2, inf)", seeds="[0, 4294967295]"
        )  # fmt: skip
        if self.base.double_batch_at:
            raise InputError("base.double_batch_at: a ladder's points have one batch size each.")
        for name in ("models", "samples", "seeds"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty; a ladder needs at least one.")
        for name in ("samples", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise InputError(f"{name}={getattr(self, name)} names one twice.")
        if self.batch_sizes and len(self.batch_sizes) != len(self.samples):
            raise InputError(
                f"batch_sizes={self.batch_sizes} must have one for each of samples={self.samples}."
            )
        if self.branches and self.sweep:
            raise InputError("branches and sweep: sweep points of schedules of their own.")
        if self.branches and len(set(self.batch_sizes)) > 1:
            raise InputError(
                f"batch_sizes={self.batch_sizes} differ, but branches of one trunk all have its "
                "batch size; give one for all, or no branches."
            )


def load_ladder(path: str | Path) -> LadderConfig:
    """Run a spec's `get_ladder()`. Raises InputError, which says what the file lacks."""
    ladder: LadderConfig = run_file(Path(path), "get_ladder", LadderConfig)
    return ladder


# ------------------------------------------------------------------ the grid


class Point(NamedTuple):
    """One run of the ladder: a point, or the trunk from which some branch."""

    name: str  # w32@16K-seed0, w32-trunk-seed0, of a sweep's trial w32@16K-rate0.5-seed0
    model: str
    samples: int  # as the spec says; the run sees a whole number of batches
    config: Config
    workdir: Path
    trunk: str = ""  # the name of the run that it branches from

    @property
    def samples_seen(self) -> int:
        return self.config.steps * self.config.batch_size

    @property
    def first_step(self) -> int:
        """The trunk's step with whose state the run begins, 0 without a trunk."""
        return branch_point(self.config.branch_from)[1] if self.config.branch_from else 0

    @property
    def training_flops(self) -> int:
        """FLOPs of the run's own steps."""
        return flops.of_step(self.config).total * (self.config.steps - self.first_step)

    def is_ready(self) -> bool:
        """Say whether the state with which it begins is there."""
        if not self.config.branch_from:
            return True
        trunk, step = branch_point(self.config.branch_from)
        return step in steps_in(Path(trunk) / "checkpoints")


def grid(ladder: LadderConfig, root: Path) -> list[Point]:
    """Make every run's config; work directories lie side by side under `root`."""
    points = []
    sweep = ladder.sweep or SweepConfig()
    own = ladder.batch_sizes or (ladder.base.batch_size,) * len(ladder.samples)
    sizes = [
        (samples, size)
        for samples, batch_size in zip(ladder.samples, own, strict=True)
        for size in sweep.batch_sizes or (batch_size,)
    ]
    lengths = [max(round(samples / size), 1) for samples, size in sizes]
    for model, architecture in ladder.models.items():
        mine: list[Point] = []
        for (samples, batch_size), steps in zip(sizes, lengths, strict=True):
            width = architecture.vision.width
            whole = min(lengths) if ladder.branches else steps  # branches share their warm-up
            optim = ladder.rules.apply(ladder.base, batch_size, width, whole)
            one = replace(
                ladder.base,
                model=architecture,
                steps=steps,
                batch_size=batch_size,
                optim=optim,
                objective=fitting(ladder.base.objective, architecture),
            )
            for trial, seed in itertools.product(sweep.trials(one), ladder.seeds):
                swept, config = trial
                name = f"{model.replace('/', '-')}@{short(samples)}{swept}-seed{seed}"
                config = replace(config, seed=seed, data=replace(config.data, seed=seed))
                mine.append(Point(name, model, samples, config, root / name))
        points += _with_trunks(mine, ladder.branches) if ladder.branches else mine
    names = [point.name for point in points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise InputError(f"points would share the names {sorted(twice)}; samples lie too close.")
    return points


def _with_trunks(points: Sequence[Point], branches: BranchesConfig) -> list[Point]:
    """Make branches of a model's points, with the trunk of each seed before them."""
    made = []
    for seed in dict.fromkeys(point.config.seed for point in points):
        mine = [point for point in points if point.config.seed == seed]
        one, optim = mine[0], mine[0].config.optim
        workdir = one.workdir.with_name(f"{one.model.replace('/', '-')}-trunk-seed{seed}")
        cooled, begin = [], []
        for point in mine:
            schedule = branches.cool_down(point.config.steps)
            begin.append(point.config.steps - schedule.steps)
            if begin[-1] < max(optim.warmup_steps, 1):
                raise InputError(
                    f"{point.name} has {point.config.steps} steps: with a warm-up of "
                    f"{optim.warmup_steps}, no trunk is left before branches.share="
                    f"{branches.share}; give more samples, or a smaller batch_size or share."
                )
            config = replace(
                point.config, optim=replace(optim, schedule=schedule),
                branch_from=f"{workdir}@{begin[-1]}",
            )  # fmt: skip
            cooled.append(point._replace(config=config, trunk=workdir.name))
        trunk = replace(
            one.config, steps=max(begin), optim=replace(optim, schedule=Constant()), evals=(),
            checkpoint=replace(one.config.checkpoint, also=tuple(sorted(set(begin))), best=None),
        )  # fmt: skip
        samples = max(begin) * trunk.batch_size
        made += [Point(workdir.name, one.model, samples, trunk, workdir), *cooled]
    return made


def is_done(point: Point) -> bool:
    """Say whether a point is trained to its end. Raises InputError if its directory holds another
    run."""
    if not (point.workdir / "checkpoints").exists() and not _result(point.workdir):
        return False  # a config that nobody has trained by may be replaced
    before = complete(read_run_config(point.workdir, recover=True))
    check_resumable(point.workdir, before, to_dict(point.config), point.config.samples_after)
    step = _result(point.workdir).get("step", 0)
    return from_dict(int, step, f"step in {point.workdir / 'result.json'}") >= point.config.end


def _result(workdir: Path) -> dict[str, Any]:
    advice = f"Bring back a copy, or delete {workdir}: the point is trained anew."
    return read_json(workdir / "result.json", advice=advice)


# ------------------------------------------------------------------ the command


@dataclass(frozen=True, kw_only=True)
class LadderCommand:
    """Train what is missing of a ladder; the same command again goes on where it stopped."""

    spec: Path  # a Python file with get_ladder(), such as configs/ladder_digits.py
    root: Path | None = None  # where the work directories lie; default: runs/ and the spec's name
    only: str = "*"  # pattern of the names of points, such as 'w32@*' or '*-seed0'
    part: str = "1/1"  # which of how many parts of the points this process takes: 1/4 to 4/4
    jobs: int = 1  # points at a time on this machine's cores; 0: only write their configs
    dry_run: bool = False  # only print the table

    def __post_init__(self) -> None:
        read_part(self.part)
        check_ranges(self, jobs="[0, inf)")


def climb(command: LadderCommand, say: jobs.Say) -> dict[str, Any]:
    """Print the table, write the configs, train what is missing.

    Returns JSON values: `points`, each with its estimates, whether it is `done` and, if it failed,
    the `failure`; and `totals` of what was missing. Raises jobs.Stopped after SIGTERM or Ctrl-C.
    """
    ladder = load_ladder(command.spec)
    root = command.root or Path("runs") / command.spec.stem
    points = _chosen(grid(ladder, root), command)
    done = {point.name for point in points if is_done(point)}
    missing = [point for point in points if point.name not in done]
    say(describe(points, done, ladder))

    def train(points: Sequence[Point]) -> dict[str, str]:
        points = [point for point in points if not is_done(point)]
        for point in points:
            config = with_order(point.config, point.workdir)  # as it began, if it did
            write_whole(point.workdir / "config.json", json.dumps(to_dict(config), indent=1))
        return _train(points, root, command.jobs, say) if command.jobs else {}

    failures: dict[str, str] = {}
    if not command.dry_run:
        check_destination(root, "--root")
        failures = train(missing)
        if command.jobs:
            done |= {point.name for point in missing} - failures.keys()
    return {
        "root": str(root),
        "points": [
            {
                "name": point.name,
                "workdir": str(point.workdir),
                "samples_seen": point.samples_seen,
                "gmacs_per_sample": gmacs(point.config.model),
                "training_flops": point.training_flops,
                "estimates": _estimates([point], ladder.hardware),
                "done": point.name in done,
                "failure": failures.get(point.name),
            }
            for point in points
        ],
        "totals": {
            "points": len(missing),
            "training_flops": sum(point.training_flops for point in missing),
            "estimates": _estimates(missing, ladder.hardware),
        },
    }


def _chosen(points: Sequence[Point], command: LadderCommand) -> list[Point]:
    """Return a command's part of the points, the longest first; trunks go with their branches."""
    wanted = {point.name for point in points if fnmatch(point.name, command.only)}
    if not wanted:
        raise InputError(f"only={command.only!r} matches no point; the first is {points[0].name}.")
    wanted |= {point.trunk for point in points if point.name in wanted}
    together: dict[str, list[Point]] = {}
    for point in points:
        if point.name in wanted:
            together.setdefault(point.trunk or point.name, []).append(point)

    def work(some: Sequence[Point]) -> int:
        return sum(point.training_flops for point in some)

    # No long one is left for the end, and parts weigh alike.
    number, parts = read_part(command.part)
    mine = sorted(together.values(), key=work, reverse=True)[number::parts]
    return sorted((p for some in mine for p in some), key=lambda point: -point.training_flops)


def _train(points: Sequence[Point], root: Path, at_a_time: int, say: jobs.Say) -> dict[str, str]:
    """Train points as processes; returns why some failed, by name."""
    environment = {
        # Points that differ in their seed compile the same step.
        "JAX_COMPILATION_CACHE_DIR": str((root / "compilation_cache").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **os.environ,
    }
    return jobs.run(
        [
            jobs.Job(
                name=point.name,
                command=[
                    *(
                        sys.executable,
                        "-m",
                        "clip_jax",
                        "train",
                        str(point.workdir / "config.json"),
                    ),
                    *("--workdir", str(point.workdir)),
                ],
                directory=point.workdir,
                is_done=partial(is_done, point),
                weight=point.training_flops,
                after=point.trunk,
                is_ready=point.is_ready,
            )
            for point in points
        ],
        at_a_time,
        environment,
        say,
    )


def _estimates(points: Sequence[Point], hardware: Sequence[HardwareConfig]) -> list[dict[str, Any]]:
    return [kind.estimate([point.training_flops for point in points]) for kind in hardware]


# ------------------------------------------------------------------ words


def describe(points: Sequence[Point], done: set[str], ladder: LadderConfig) -> str:
    """Put the grid into a table, a line for each model and number of samples."""
    hardware = ladder.hardware
    head = ["model", "pairs", "batch", "steps", "rate", "warm-up", "FLOPs a run", "runs", "done"]
    head[4:4] = ["own"] if ladder.branches else []
    for kind in hardware:
        head += [f"{kind.chips} {kind.chip}", *(["$ a run"] if kind.price else [])]
    groups: dict[tuple[str, bool, int], list[Point]] = {}
    for point in sorted(points, key=lambda point: (gmacs(point.config.model), point.samples)):
        key = (point.model, not (ladder.branches and not point.trunk), point.samples)
        groups.setdefault(key, []).append(point)
    rows = [head]
    for (model, is_point, _), group in groups.items():
        point, config = group[0], group[0].config
        row = [
            model if is_point else f"{model} trunk", short(point.samples_seen),
            f"{config.batch_size:,}", f"{config.steps:,}",
            *([f"{config.steps - point.first_step:,}"] if ladder.branches else []),
            f"{config.optim.learning_rate:g}", f"{config.optim.warmup_steps:,}",
            f"{point.training_flops:.2e}", str(len(group)),
            str(sum(other.name in done for other in group)),
        ]  # fmt: skip
        for kind in hardware:
            hours = kind.hours(point.training_flops)
            row += [duration(hours), *([f"{kind.dollars(hours):,.0f}"] if kind.price else [])]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    missing = [point for point in points if point.name not in done]
    total = sum(point.training_flops for point in missing)
    lines.append(f"{len(missing)} of {len(points)} runs are missing: {total:.2e} training FLOPs")
    lines += map(in_words, _estimates(missing, hardware))
    if ladder.branches:
        alone, together = compute_saved(points)
        lines.append(
            f"{together:.2e} FLOPs for all points from trunks, {alone:.2e} with a run for each: "
            f"{1 - together / alone:.0%} saved. The trunks keep the checkpoints of "
            f"{sum(len(point.config.checkpoint.also) for point in points)} steps, where branches "
            "begin."
        )
    return "\n".join(lines)


def compute_saved(points: Sequence[Point]) -> tuple[int, int]:
    """Return the FLOPs of all points, each trained from its beginning, and with trunks as here."""
    step = {point.name: flops.of_step(point.config).total for point in points}
    trunks = {point.trunk for point in points}
    alone = sum(step[p.name] * p.config.steps for p in points if p.name not in trunks)
    return alone, sum(point.training_flops for point in points)
