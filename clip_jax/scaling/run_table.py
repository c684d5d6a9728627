"""One table of runs, one row a trained model: read, written, and gathered from run directories.

Columns are those of Cherti et al.'s results: `arch`, `samples_seen`, `gmacs_per_sample` (forward,
one pair, fvcore's count), `mparams`, and one column a metric. Whatever else a run knows (seed,
learning rate, where it came from) is a column too.
"""

import csv
import functools
import io
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clip_jax import flops
from clip_jax.checkpoints.resume import branch_point
from clip_jax.checkpoints.retention import WATCHED
from clip_jax.checkpoints.run_config import upgrade
from clip_jax.data import growth
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, CLIPConfig, count
from clip_jax.models.vit import ViTConfig
from clip_jax.scaling.laws import Runs
from clip_jax.serialize import from_dict
from clip_jax.storage.files import AnyPath, as_path, check_destination, walk, write_whole
from clip_jax.storage.files import read as read_file
from clip_jax.storage.json_files import read_rows

Row = dict[str, Any]

FIRST = ("arch", "samples_seen", "gmacs_per_sample", "mparams", "source")


# ------------------------------------------------------------------ the table


@dataclass(frozen=True)
class RunTable:
    """Rows by column: text or numbers, and nothing where a run says nothing."""

    rows: Sequence[Row]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def check(self, *columns: str) -> None:
        """Raise InputError for a column that is not there."""
        names = self.columns
        for column in columns:
            if column not in names:
                raise InputError(
                    f"the table has no column {column!r}; it has {', '.join(names) or 'no rows'}."
                )

    def select(self, metric: str, where: Sequence[str] = ()) -> "RunTable":
        """Keep the rows that have the metric and match every COLUMN=PATTERN.

        Raises InputError for a column that is not there, and when nothing is left.
        """
        self.check("arch", "samples_seen", "gmacs_per_sample", metric)
        rows = [row for row in self.rows if text(row, metric)]
        for condition in where:
            column, equals, pattern = condition.partition("=")
            if not equals:
                raise InputError(f"where={condition!r} must be COLUMN=PATTERN.")
            self.check(column)
            rows = [row for row in rows if fnmatch(text(row, column), pattern)]
        if not rows:
            raise InputError(f"no row of the table has {metric!r} and matches {list(where)}.")
        return RunTable(rows)

    def groups(self, key: Callable[[Row], Any]) -> dict[Any, "RunTable"]:
        """Put rows with the same key together, in the order of the first of each."""
        groups: dict[Any, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row)
        return {value: RunTable(rows) for value, rows in groups.items()}

    def numbers(self, column: str) -> np.ndarray:
        """Return a column of numbers. Raises InputError for a cell that is none."""
        return np.array([number(row, column) for row in self.rows])

    def runs(self, metric: str, is_score: bool, third: str = "") -> Runs:
        """Make runs of rows: errors from the metric, the third quantity from a column."""
        columns = ["gmacs_per_sample", "samples_seen", metric, *([third] if third else [])]
        self.check(*columns)
        sizes, samples, values, *others = map(self.numbers, columns)
        if not all(np.isfinite(x).all() for x in (values, samples, sizes, *others)):
            raise InputError(f"one of {', '.join(map(repr, columns))} is not finite in some row.")
        labels = [
            text(row, "samples_seen_scale") or short(count)
            for row, count in zip(self.rows, samples.tolist(), strict=True)
        ]
        return Runs(
            size=sizes,
            samples=samples,
            error=1 - values if is_score else values,
            third=others[0] if others else None,
            model=np.array([row["arch"] for row in self.rows]),
            length=np.array(labels),
        )


def text(row: Row, column: str) -> str:
    """Return a cell as the text that a file has of it."""
    return "" if row.get(column) is None else str(row[column])


def number(row: Row, column: str) -> float:
    """Read a cell. Raises InputError if it is empty or no number."""
    try:
        return float(text(row, column))
    except ValueError as error:
        what = f"{column} of {row['arch']} is {text(row, column)!r}, not a number"
        raise InputError(f"{what}: mend the table, or leave the row out by --where.") from error


def read(path: AnyPath) -> RunTable:
    """Read a table: the one place that does. Raises InputError for a file that is none."""
    if not path.is_file():
        raise InputError(f"no table at {path}; `clip-jax scale collect` writes one.")
    try:
        text = io.StringIO(read_file(path).decode("utf-8"), newline="")
        lines = list(csv.DictReader(text, restkey="", restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV: {error}.") from error
    # Cells beyond the header are dropped.
    return RunTable([{name: cell for name, cell in line.items() if name} for line in lines])


def write(table: RunTable, path: AnyPath) -> None:
    """Write a table as CSV; a column for everything that any of its rows has."""
    file = io.StringIO()
    columns = list(dict.fromkeys([*FIRST, *table.columns]))
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    write_whole(path, file.getvalue())


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Gather finished runs into one table."""

    paths: tuple[AnyPath, ...] = (Path("runs"),)  # run directories, ladders, tables
    output: AnyPath = Path("scaling.csv")  # the table


def collect(config: CollectConfig) -> dict[str, Any]:
    """Write the table. Returns its path, the number of rows and why runs were left out."""
    check_destination(config.output, "--output", folder=False)
    table, skipped = gather(config.paths)
    if not table.rows:
        raise InputError(
            f"no finished run under {', '.join(map(str, config.paths))}"
            + "".join(f"\n  {line}" for line in skipped)
        )
    write(table, config.output)
    return {"table": str(config.output), "rows": len(table.rows), "skipped": skipped}


# ------------------------------------------------------------------ numbers and names


def parse_count(text: str) -> float:
    """Read "12.8B", "400M", "64K" or a plain number."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\d+)?)([KMB]?)", text.strip(), re.IGNORECASE)
    if not match:
        raise InputError(f"{text!r} is not a number of samples; write 12.8B, 400M or 64000.")
    return float(match[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[match[2].upper()]


def short(number: float) -> str:
    """Write a count in two digits: 13B, 2.6B, 400M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.995 * unit:
            value = number / unit
            return f"{value:.0f}{name}" if value >= 9.95 else f"{value:.1f}{name}".replace(".0", "")
    return f"{number:g}"


@functools.cache
def gmacs(config: CLIPConfig) -> float:
    """Forward GMACs of one pair, as fvcore counts them."""
    return flops.forward(config, "fvcore").total / 1e9


@functools.cache
def mparams(config: CLIPConfig) -> float:
    """Millions of parameters."""
    shapes = dict(jax.eval_shape(CLIP(config).init, jax.random.key(0)))
    shapes.pop("batch_stats", None)  # BatchNorm's running statistics are not trained
    return count(shapes) / 1e6


def arch_of(config: CLIPConfig) -> str:
    """Name an architecture: the zoo's name for it, or its measures."""

    def shape(c: CLIPConfig) -> CLIPConfig:
        plain = {name: getattr(CLIPConfig, name) for name in ("remat", "unroll", "attention")}
        return replace(c, dtype="bfloat16", init_logit_scale=1.0, **plain)

    for name, known in zoo.ARCHITECTURES.items():
        if shape(known) == shape(config):
            return name
    v = config.vision
    kind = (
        f"ViT-w{v.width}d{v.depth}p{v.patch_size}" if isinstance(v, ViTConfig) else f"RN-w{v.width}"
    )
    return f"{kind}-text-w{config.text.width}d{config.text.depth}"


# ------------------------------------------------------------------ gathering


def gather(paths: Sequence[AnyPath]) -> tuple[RunTable, list[str]]:
    """Read every finished run directory and every CSV of runs below the paths.

    Returns the table, and one line for each run or file that could not become rows of it.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist; give run directories or tables.")
        files = [path]
        if path.is_dir():
            named = (as_path(file) for file in walk(path))
            files = [x for x in named if x.name == "result.json" or x.suffix == ".csv"]
        for file in sorted(files):
            try:
                rows += [_ours(file)] if file.name == "result.json" else _table(file)
            except Unfinished as reason:
                skipped.append(f"{file}: {reason}")
    return RunTable(rows), skipped


class Unfinished(Exception):
    """A run that has no place in a table, and why."""


def _table(file: AnyPath) -> list[Row]:
    """Rows of a table of runs, whoever wrote it."""
    rows = [{"source": str(file), **line} for line in read(file).rows]
    if not rows or not {"arch", "samples_seen"} <= set(rows[0]):
        raise Unfinished("no table with columns arch and samples_seen")
    return rows


def _ours(file: AnyPath) -> Row:
    """A run directory of `clip-jax train`."""
    config = file.with_name("config.json")
    if not config.exists():
        raise Unfinished("no config.json beside it")
    try:
        result, run = (json.loads(path.read_text()) for path in (file, config))
        run = upgrade(run)
        end = run["steps"]  # a run that --stop-after has stopped is in the middle of its schedule
        if result.get("step") != end:
            raise Unfinished(f"stopped at step {result.get('step')} of {end}")
        watched = {row["step"]: row for row in read_rows(file.parent / WATCHED)}
        if watched and end not in watched:
            raise Unfinished(f"its watcher has evaluated step {max(watched)} of {end}")
        if reason := watched.get(end, {}).get("skipped"):
            raise Unfinished(f"its watcher skipped step {end}: {reason}")
        row = of_run(run, end)
        row |= {"source": str(file.parent), "samples_seen": result.pop("samples_seen")}
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise Unfinished(f"not a run's result.json and config.json ({error!r})") from error
    return row | {key: value for key, value in result.items() if isinstance(value, int | float)}


def of_run(run: dict[str, Any], step: int) -> Row:
    """Say what a run directory's config tells of a run that has come to a step.

    Raises LookupError, TypeError or ValueError for what is no such config.
    """
    model = from_dict(CLIPConfig, run["model"], "model")
    optim, batch_size = run["optim"], run["batch_size"]
    doubled, locked = run.get("double_batch_at", ()), tuple(optim.get("locked", ()))
    first = branch_point(run["branch_from"])[1] if run.get("branch_from") else 0

    def work(steps: int) -> int:
        phases = growth.phases(batch_size, doubled, steps)
        return sum(flops.training(model, n, locked=locked).total * count for n, count in phases)

    return {
        "arch": arch_of(model),
        "samples_seen": growth.samples_after(batch_size, doubled, step),
        "gmacs_per_sample": gmacs(model),
        "mparams": round(mparams(model), 6),
        "training_flops": work(step),
        "flops_spent": max(work(step) - work(first), 0),  # a parent run had done the first steps
        **_kinds(run),
        "seed": run["seed"],
        "global_batch": batch_size,
        "lr": optim["learning_rate"],
        "warmup": optim["warmup_steps"],
        "weight_decay": optim["weight_decay"],
        "width": model.vision.width,
    }


def _kinds(run: dict[str, Any]) -> Row:
    """Say by what families of runs are told apart: from a run directory's config."""
    source = run.get("data", {}).get("source", {})
    losses = [term["type"] for term in run.get("objective", [])]
    decoder = (run["model"].get("decoder") or {}).get("type", "").removesuffix("Config")
    schedule = run["optim"].get("schedule", {}).get("type", "Cosine")
    return {
        "family": decoder or ("SigLIP" if "SigmoidConfig" in losses else "CLIP"),
        "data": source.get("path") or source.get("type", "").removesuffix("Config").lower(),
        "schedule": re.sub(r"(?<=[a-z])(?=[A-Z])", "_", schedule).lower(),
    }
