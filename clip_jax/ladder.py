"""A ladder of runs: models × samples seen × seeds, each over a whole schedule of its own.

A spec is a Python file with `get_ladder() -> LadderConfig`. Every point of the grid becomes an
ordinary run: a `config.json` in its own work directory, trained by `clip-jax train` as a process.
The FLOPs are counted, the hours follow from a stated MFU, the price from a stated rate.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from clip_jax import jobs
from clip_jax.config import Config, check_resumable, run_file
from clip_jax.metrics import replace_text
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.serialize import to_dict
from clip_jax.optim import OptimConfig
from clip_jax.scaling import chips, flops
from clip_jax.scaling.table import gmacs, short

# ------------------------------------------------------------------ the spec


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """How a point's learning rate and warm-up follow from its batch, its width and its length.

    The base config's peak rate holds at the base's batch size and at `reference_width`:
    rate = base × (batch / base's batch)^batch_exponent × (width / reference)^width_exponent.
    The final rate keeps its share of the peak.
    """

    batch_exponent: float = 0.5  # Adam: the square root (Malladi et al. 2022, arXiv:2205.10287)
    reference_width: int = 768  # of the image tower
    width_exponent: float = 0.0  # 0: one rate for all widths, as open_clip's from S/32 to L/14
    max_warmup_share: float = 0.1  # of a run's steps, where the base's warm-up is longer than that

    def __post_init__(self) -> None:
        if self.reference_width < 1:
            raise ValueError(f"rules.reference_width={self.reference_width} must be at least 1.")
        if not 0 <= self.max_warmup_share < 1:
            raise ValueError(
                f"rules.max_warmup_share={self.max_warmup_share} must be at least 0, less than 1."
            )

    def apply(self, base: Config, batch_size: int, width: int, steps: int) -> OptimConfig:
        """Return the optimizer's config of one point."""
        factor = (batch_size / base.batch_size) ** self.batch_exponent
        factor *= (width / self.reference_width) ** self.width_exponent
        return replace(
            base.optim,
            learning_rate=_digits(base.optim.learning_rate * factor),
            final_learning_rate=_digits(base.optim.final_learning_rate * factor),
            warmup_steps=min(base.optim.warmup_steps, int(self.max_warmup_share * steps)),
        )


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """What trains a point, as assumed for its hours and its price."""

    chip: str = "TPU v5e"  # as in scaling/chip_specs.csv, or anything with a peak_flops
    chips: int = 1  # that train one point together
    mfu: float = 0.4  # assumed share of the peak; `clip-jax plan` and `bench` have better figures
    price: float | None = None  # US dollars of one chip for one hour
    peak_flops: float | None = None  # FLOP/s of one chip; None: the table's dense bf16 peak
    start_seconds: float = 0.0  # of each point: start, compilation, evaluation

    def __post_init__(self) -> None:
        if self.peak_flops is None and self.chip not in chips.chips():
            raise ValueError(
                f"hardware.chip={self.chip!r} is none of {', '.join(chips.chips())}; take one of "
                "these or give hardware.peak_flops."
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"hardware.mfu={self.mfu} must be more than 0 and at most 1.")
        if self.chips < 1:
            raise ValueError(f"hardware.chips={self.chips} must be at least 1.")

    def hours(self, training_flops: float) -> float:
        """Estimate the hours of one point: the one place where FLOPs become time."""
        peak = self.peak_flops or chips.chips()[self.chip].peak_flops
        seconds = training_flops / (self.chips * peak * self.mfu) + self.start_seconds
        return seconds / 3600

    def dollars(self, hours: float) -> float | None:
        return None if self.price is None else hours * self.chips * self.price


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """Models × samples × seeds. What the points share is an ordinary config."""

    base: Config  # data, loss, evaluations, optimizer; model, steps, seeds and rates are replaced
    models: Mapping[str, CLIPConfig]  # by the name that its points get
    samples: tuple[int, ...]  # pairs seen, over the whole of one point's schedule
    batch_sizes: tuple[int, ...] = ()  # one for each of `samples`; none: the base's for all
    seeds: tuple[int, ...] = (0,)  # of the parameters and of the data's order
    rules: RulesConfig = field(default_factory=RulesConfig)
    hardware: tuple[HardwareConfig, ...] = ()  # to estimate for, one after the other

    def __post_init__(self) -> None:
        for name in ("models", "samples", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; a ladder needs at least one.")
        for name in ("samples", "seeds"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} names one twice.")
        if self.batch_sizes and len(self.batch_sizes) != len(self.samples):
            raise ValueError(
                f"batch_sizes={self.batch_sizes} must have one for each of samples={self.samples}."
            )


def load_ladder(path: str | Path) -> LadderConfig:
    """Run a spec's `get_ladder()`. ValueError says what the file lacks."""
    ladder: LadderConfig = run_file(Path(path), "get_ladder", LadderConfig)
    return ladder


# ------------------------------------------------------------------ the grid


class Point(NamedTuple):
    """One run of the ladder."""

    name: str  # w32@16K-seed0
    model: str
    samples: int  # as the spec says; the run sees a whole number of batches
    config: Config
    workdir: Path

    @property
    def samples_seen(self) -> int:
        return self.config.steps * self.config.batch_size

    @property
    def training_flops(self) -> int:
        step = flops.training(self.config.model, self.config.batch_size)
        return step.total * self.config.steps


def grid(ladder: LadderConfig, root: Path) -> list[Point]:
    """Make every point's config; work directories lie side by side under `root`."""
    points = []
    batch_sizes = ladder.batch_sizes or (ladder.base.batch_size,) * len(ladder.samples)
    for model, architecture in ladder.models.items():
        for samples, batch_size in zip(ladder.samples, batch_sizes, strict=True):
            steps = max(round(samples / batch_size), 1)
            width = architecture.vision.width
            optim = ladder.rules.apply(ladder.base, batch_size, width, steps)
            for seed in ladder.seeds:
                name = f"{model.replace('/', '-')}@{short(samples)}-seed{seed}"
                config = replace(
                    ladder.base, model=architecture, steps=steps, batch_size=batch_size,
                    optim=optim, seed=seed, data=replace(ladder.base.data, seed=seed),
                )  # fmt: skip
                points.append(Point(name, model, samples, config, root / name))
    names = [point.name for point in points]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"points would share the names {sorted(twice)}; samples lie too close.")
    return points


def is_done(point: Point) -> bool:
    """Say whether a point is trained to its end. ValueError if its directory holds another run."""
    if not (point.workdir / "checkpoints").exists() and not _result(point.workdir):
        return False  # a config that nobody has trained by may be replaced
    check_resumable(point.workdir, point.config)
    return _result(point.workdir).get("step") == point.config.steps


def _result(workdir: Path) -> dict[str, Any]:
    path = workdir / "result.json"
    return json.loads(path.read_text()) if path.exists() else {}


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
        _part(self.part)
        if self.jobs < 0:
            raise ValueError(f"jobs={self.jobs} must be at least 0.")


def climb(command: LadderCommand, say: jobs.Say) -> dict[str, Any]:
    """Print the table, write the configs, train what is missing.

    Returns JSON values: `points`, each with its estimates, whether it is `done` and, if it failed,
    the `failure`; and `totals` of what was missing. Raises jobs.Stopped after SIGTERM or Ctrl-C.
    """
    ladder = load_ladder(command.spec)
    root = command.root or Path("runs") / command.spec.stem
    points = [point for point in grid(ladder, root) if fnmatch(point.name, command.only)]
    if not points:
        raise ValueError(
            f"only={command.only!r} matches no point; the first is {grid(ladder, root)[0].name}."
        )
    # The longest first: no long one is left for the end, and parts weigh alike.
    points.sort(key=lambda point: -point.training_flops)
    number, parts = _part(command.part)
    points = points[number - 1 :: parts]
    done = {point.name for point in points if is_done(point)}
    missing = [point for point in points if point.name not in done]
    say(describe(points, done, ladder.hardware))

    failures: dict[str, str] = {}
    if not command.dry_run:
        for point in missing:
            if not (point.workdir / "checkpoints").exists():
                point.workdir.mkdir(parents=True, exist_ok=True)
                text = json.dumps(to_dict(point.config), indent=1)
                replace_text(point.workdir / "config.json", text)
        if command.jobs:
            failures = _train(missing, root, command.jobs, say)
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


def _part(text: str) -> tuple[int, int]:
    number, slash, parts = text.partition("/")
    if not (slash and number.isdecimal() and parts.isdecimal() and 0 < int(number) <= int(parts)):
        raise ValueError(f"part={text!r} must be i/n with i from 1 to n, such as 1/4.")
    return int(number), int(parts)


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
            )
            for point in points
        ],
        at_a_time,
        environment,
        say,
    )


def _estimates(points: Sequence[Point], hardware: Sequence[HardwareConfig]) -> list[dict[str, Any]]:
    estimates = []
    for kind in hardware:
        hours = sum(kind.hours(point.training_flops) for point in points)
        assumed = {"chip": kind.chip, "chips": kind.chips, "mfu": kind.mfu, "price": kind.price}
        estimates.append({**assumed, "hours": hours, "dollars": kind.dollars(hours)})
    return estimates


# ------------------------------------------------------------------ words


def describe(points: Sequence[Point], done: set[str], hardware: Sequence[HardwareConfig]) -> str:
    """Put the grid into a table, a line for each model and number of samples."""
    head = ["model", "pairs", "batch", "steps", "rate", "warm-up", "FLOPs a run", "runs", "done"]
    for kind in hardware:
        head += [f"{kind.chips} {kind.chip}", *(["$ a run"] if kind.price else [])]
    groups: dict[tuple[str, int], list[Point]] = {}
    for point in sorted(points, key=lambda point: (gmacs(point.config.model), point.samples)):
        groups.setdefault((point.model, point.samples), []).append(point)
    rows = [head]
    for (model, _), group in groups.items():
        point, config = group[0], group[0].config
        row = [
            model, short(point.samples_seen), f"{config.batch_size:,}", f"{config.steps:,}",
            f"{config.optim.learning_rate:g}", f"{config.optim.warmup_steps:,}",
            f"{point.training_flops:.2e}", str(len(group)),
            str(sum(other.name in done for other in group)),
        ]  # fmt: skip
        for kind in hardware:
            hours = kind.hours(point.training_flops)
            row += [_duration(hours), *([f"{kind.dollars(hours):,.0f}"] if kind.price else [])]
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
    return "\n".join([*lines, *map(_total, _estimates(missing, hardware))])


def _total(estimate: Mapping[str, Any]) -> str:
    line = (
        f"  {estimate['chips']} {estimate['chip']} at an assumed {estimate['mfu']:.0%} of the "
        f"peak: {_duration(estimate['hours'])} one after the other"
    )
    if estimate["price"]:
        line += f", ${estimate['dollars']:,.0f} at ${estimate['price']:g} a chip and hour"
    return line


def _duration(hours: float) -> str:
    """Write a time in the unit that suits it."""
    if hours >= 48:
        return f"{hours / 24:,.0f} d"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min"


def _digits(number: float) -> float:
    """Round to three digits: a rate that a person can repeat."""
    return float(f"{number:.3g}")
