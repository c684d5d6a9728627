"""Read, write and collect tables of runs, with one row per trained model.

Columns are those of Cherti et al.'s results: `arch`, `samples_seen`, `gmacs_per_sample` (forward,
one pair, fvcore's count), `mparams`, and one column per metric. Other facts of a run (seed,
learning rate, source, ...) are columns, too.
"""

import csv
import functools
import gzip
import io
import operator
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from clip_jax import flops, parts
from clip_jax.checkpoints.resume import branch_point
from clip_jax.checkpoints.retention import WATCHED
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.config import Config
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, CLIPConfig, count
from clip_jax.scaling.columns import Row, mapped, numeric
from clip_jax.scaling.laws import Runs
from clip_jax.serialize import from_dict
from clip_jax.storage.files import AnyPath, as_path, check_destination, walk, write_whole
from clip_jax.storage.files import read as read_file
from clip_jax.storage.json_files import parse, read_json, read_rows

LEAST, MOST = 1e-12, 1e18  # of sizes, samples and batches
MOST_FLOPS = 1e40
ERROR = re.compile(r"loss|info_nce|perplexity")  # names of metrics that are better when lower

COMPARISONS = {
    "=": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


@dataclass(frozen=True)
class RunTable:
    """Rows as dicts by column: text or numbers; columns may be missing or None."""

    rows: Sequence[Row]

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def check(self, *columns: str, option: str = "") -> None:
        """Raise InputError for a missing column, which `option` names, if any."""
        names = self.columns
        choose = f"Choose one of them with {option}, or map" if option else "Map"
        for column in columns:
            if column not in names:
                raise InputError(
                    f"the table has no column {column!r}; it has {', '.join(names) or 'no rows'}. "
                    f"{choose} the names of another program's table with --columns."
                )

    def select(self, metric: str, where: Sequence[str] = ()) -> "RunTable":
        """Keep the rows that have the metric and match every condition, such as arch=ViT-B*.

        Raises InputError for a missing column, or if no row is left.
        """
        self.check("arch", "samples_seen", "gmacs_per_sample")
        self.check(metric, option="--metric")
        meets = zip(self.rows, self.meets(where), strict=True)
        rows = [row for row, is_met in meets if is_met and text(row, metric)]
        if not rows:
            raise InputError(f"no row of the table has {metric!r} and matches where={list(where)}.")
        return RunTable(rows)

    def meets(self, conditions: Sequence[str]) -> list[bool]:
        """Return for each row whether it meets all conditions, such as samples_seen<=3e9."""
        met = [True] * len(self.rows)
        for condition in conditions:
            match = re.fullmatch(r"(.+?)(<=|>=|!=|=|<|>)(.*)", condition)
            if not match:
                raise InputError(
                    f"{condition!r} must be COLUMN=PATTERN, like arch=ViT-B*, or a comparison, "
                    "like samples_seen<=3e9."
                )
            column, sign, value = match.groups()
            self.check(column, *re.findall(r"^\{(.*)\}$", value))
            met = [
                is_met and _fulfils(row, column, sign, value)
                for row, is_met in zip(self.rows, met, strict=True)
            ]
        return met

    def groups(self, key: Callable[[Row], Any]) -> dict[Any, "RunTable"]:
        """Group rows by key, in the order in which keys appear."""
        groups: dict[Any, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(key(row), []).append(row)
        return {value: RunTable(rows) for value, rows in groups.items()}

    def numbers(self, column: str) -> np.ndarray:
        """Return a column as numbers. Raises InputError for a cell that is not a number."""
        return np.array([number(row, column) for row in self.rows])

    def bounded(self, column: str, least: float = LEAST, most: float = MOST) -> np.ndarray:
        """Return a column as numbers. Raises InputError for one that no run can have."""
        values = self.numbers(column)
        for row, value in zip(self.rows, values, strict=True):
            if not least <= value <= most:
                above = f"{column}>0" if least else f"{column}>=0"
                excluded = f"{column}<={most:g}" if value > most else above
                raise InputError(
                    f"{column} of {row['arch']} is {value:g}, but must be from {least:g} to "
                    f"{most:g}; correct the table, map its unit with --columns, or exclude the row "
                    f"with --where '{excluded}'."
                )
        return values

    def size_of(self, model: str) -> float:
        """Return the forward GMACs of a model of the table or else of the zoo.

        Raises InputError if there is none, or if models of different sizes have this name.
        """
        rows = RunTable([row for row in self.rows if row["arch"] == model])
        if not rows.rows:
            try:
                return gmacs(zoo.get(model))
            except InputError as error:
                names = ", ".join(sorted({str(row["arch"]) for row in self.rows}))
                raise InputError(f"the table has {names}, and {error}") from error
        sizes = rows.numbers("gmacs_per_sample")
        if sizes.max() > 1.02 * sizes.min():
            raise InputError(
                f"models of {sizes.min():.4g} to {sizes.max():.4g} GMACs are all named {model}; "
                "correct the column arch, or exclude all but one with --where gmacs_per_sample<..."
            )
        return float(sizes[-1])

    def runs(self, metric: str, is_score: bool, third: str = "") -> Runs:
        """Convert rows to runs: the error from the metric, the third quantity from a column."""
        self.check("gmacs_per_sample", "samples_seen", metric, *([third] if third else []))
        sizes = self.bounded("gmacs_per_sample")
        samples = self.bounded("samples_seen")
        values = self.numbers(metric)
        if not np.isfinite(values).all():
            raise InputError(
                f"{metric} must be finite in every row; correct the table, or exclude the rows of "
                f"diverged runs with --where, such as --where '{metric}<1e9'."
            )
        if not is_score:
            self.bounded(metric)
        if is_score and not ((values >= 0) & (values <= 1)).all():
            raise InputError(
                f"{metric} reaches from {values.min():g} to {values.max():g}; a score must be "
                "between 0 and 1. Set --metric-is error for a loss, or choose another metric."
            )
        counts = zip(self.rows, samples.tolist(), strict=True)
        lengths = [text(row, "samples_seen_scale") or short(count) for row, count in counts]
        return Runs(
            sizes,
            samples,
            error=1 - values if is_score else values,
            third=self.bounded(third) if third else None,
            length=np.array(lengths),
            model=np.array([row["arch"] for row in self.rows]),
        )


def text(row: Row, column: str) -> str:
    """Return a cell as text, as in a file; "" for a missing one."""
    return "" if row.get(column) is None else str(row[column])


def number(row: Row, column: str) -> float:
    """Return a cell as a number. Raises InputError if it is empty or not a number."""
    try:
        return numeric(text(row, column))
    except ValueError as error:
        what = f"{column} of {text(row, 'arch') or 'a row'} is {text(row, column)!r}, not a number"
        hint = f"exclude the row with --where, such as --where '{column}>0'"
        raise InputError(f"{what}: correct the table, or {hint}.") from error


def _fulfils(row: Row, column: str, sign: str, value: str) -> bool:
    """Return whether a cell fulfils a condition; {COLUMN} as a value is that of another column."""
    cell = text(row, column)
    if value.startswith("{") and value.endswith("}"):
        value = text(row, value[1:-1])
    try:
        return COMPARISONS[sign](numeric(cell), numeric(value))
    except ValueError as error:
        if sign in ("=", "!="):
            return fnmatch(cell, value) == (sign == "=")
        if cell:
            raise InputError(
                f"where={column}{sign}{value}: {cell!r} and {value!r} must be numbers, like 3e9 or "
                "12.8B; = and != compare text."
            ) from error
        return False  # a row without a number


def read(path: AnyPath, columns: Sequence[str] = ()) -> RunTable:
    """Read a table: CSV, or JSON Lines by its ending .jsonl; both may be compressed by gzip.

    Nothing else reads tables. Raises InputError for a file that is neither.

    `columns` maps columns of other programs, as in the module `columns`. Sizes that the table lacks
    are those of the architectures in the zoo.
    """
    if not path.is_file():
        raise InputError(f"there is no table {path}; `clip-jax scale collect` writes one.")
    try:
        content = read_file(path)
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        written = content.decode("utf-8-sig")
        lines = _json_lines(written) if ".jsonl" in path.suffixes[-2:] else _csv_lines(written)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as a table: {error}.") from error
    except InputError as error:
        raise InputError(f"{path} {error}") from error
    rows = mapped(lines, columns)
    for row in rows:
        arch = text(row, "arch")
        if not text(row, "gmacs_per_sample") and arch in zoo.ARCHITECTURES:
            row["gmacs_per_sample"] = gmacs(zoo.ARCHITECTURES[arch])
    return RunTable(rows)


def _csv_lines(written: str) -> list[Row]:
    reader = csv.DictReader(io.StringIO(written, newline=""), restkey="")
    lines = list(reader)
    names = Counter(filter(None, reader.fieldnames or ()))
    if twice := [name for name, count in names.items() if count > 1]:
        raise InputError(f"has two columns {twice[0]!r}; rename or delete one of them.")
    # Drop cells beyond the header.
    return [{name: x or "" for name, x in line.items() if name} for line in lines]


def _json_lines(written: str) -> list[Row]:
    rows = []
    for number, line in enumerate(written.splitlines(), 1):
        if not line.strip():
            continue
        row = parse(line.encode())
        if row is None or any(isinstance(cell, dict | list) for cell in row.values()):
            raise InputError(
                f"cannot be read as a table: line {number} must be one JSON object, whose values "
                "are texts or numbers."
            )
        rows.append({name: "" if cell is None else cell for name, cell in row.items()})
    return rows


def write(table: RunTable, path: AnyPath) -> None:
    """Write a table as CSV, with every column that any row has."""
    file = io.StringIO()
    writer = csv.DictWriter(file, table.columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.rows)
    write_whole(path, file.getvalue())


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rows of a table that a command uses, and whose columns the table has."""

    # Conditions that a row must meet: COLUMN=PATTERN, such as arch=ViT-B*, or a comparison, such as
    # samples_seen<=3e9.
    where: tuple[str, ...] = ()
    # Columns of another program's table, as OURS=THEIRS or OURS=THEIRS:UNIT, such as
    # gmacs_per_sample=flops:GFLOPs, or a preset: open_clip, clip_benchmark, cherti or laion. A
    # column written as =THEIRS is left out: rows of a long table that differ in it are joined.
    columns: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Collect finished runs in one table."""

    paths: tuple[AnyPath, ...] = (Path("runs"),)  # Run directories, folders of these, or tables.
    output: AnyPath = Path("scaling.csv")  # Table to write (CSV).
    columns: tuple[str, ...] = ()  # Columns of other programs' tables, as for `scale fit`.


def collect(config: CollectConfig) -> dict[str, Any]:
    """Write the table; return its path, the number of rows, and the reasons of skipped runs."""
    check_destination(config.output, "--output", folder=False)
    table, skipped = gather(config.paths, config.columns)
    if not table.rows:
        raise InputError(
            f"no finished run under {', '.join(map(str, config.paths))}"
            + "".join(f"\n  {line}" for line in skipped)
        )
    write(table, config.output)
    return {"table": str(config.output), "rows": len(table.rows), "skipped": skipped}


def is_score(metric: str, metric_is: Literal["score", "error"] | None = None) -> bool:
    """Return whether a metric is a score, such as an accuracy, or else a loss or an error.

    Without `metric_is`, the name decides: one with loss, info_nce or perplexity is an error.
    """
    return not ERROR.search(metric) if metric_is is None else metric_is == "score"


def parse_count(text: str) -> float:
    """Read "12.8B", "400M", "64K" or a plain number."""
    is_count = re.fullmatch(r"\d+(\.\d+)?(e\+?\d+|[KMB])?", text.strip(), re.IGNORECASE)
    if not is_count or not 1 <= numeric(text) <= MOST:
        raise InputError(
            f"{text!r} is not a number of samples from 1 to {MOST:g}; write 12.8B, 400M or 64000."
        )
    return numeric(text)


def short(number: float) -> str:
    """Format a count with about two digits: 13B, 2.6B, 400M."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.995 * unit:
            value = number / unit
            return f"{value:.0f}{name}" if value >= 9.95 else f"{value:.1f}{name}".replace(".0", "")
    return f"{number:g}"


@functools.cache
def gmacs(config: CLIPConfig) -> float:
    """Return the forward GMACs of one pair, as fvcore counts them."""
    return flops.forward(config, "fvcore").total / 1e9


@functools.cache
def mparams(config: CLIPConfig) -> float:
    """Return the number of parameters in millions."""
    return count(dict(jax.eval_shape(CLIP(config).init, jax.random.key(0)))) / 1e6


def gather(paths: Sequence[AnyPath], columns: Sequence[str] = ()) -> tuple[RunTable, list[str]]:
    """Read every finished run directory and every CSV of runs below the paths.

    CSVs in a run directory are the run's own results, and not read. `columns` maps those of the
    tables. Returns the table, and one line for each run or file that was skipped, with the reason.
    """
    rows: list[Row] = []
    skipped: list[str] = []
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist; name run directories or tables.")
        files = [path]
        if path.is_dir():
            named = [as_path(file) for file in walk(path)]
            runs = {x.parent for x in named if x.name == "config.json"}
            tables = [x for x in named if x.suffix == ".csv" and runs.isdisjoint(x.parents)]
            files = [x for x in named if x.name == "result.json"] + tables
        for file in sorted(files):
            try:
                rows += [_ours(file)] if file.name == "result.json" else _table(file, columns)
            except parts.NotImported:
                raise
            except InputError as reason:
                if file == path:
                    raise  # a table by name; those in folders may be of other kinds
                skipped.append(f"{file}: {reason}")
    return RunTable(rows), skipped


def _table(file: AnyPath, columns: Sequence[str]) -> list[Row]:
    """Read the rows of a CSV of runs from any program."""
    table = read(file, columns)
    table.check("arch", "samples_seen")
    return [{**row, "source": row.get("source", str(file))} for row in table.rows]


def _ours(file: AnyPath) -> Row:
    """Read the row of a run of `clip-jax train`. Raises InputError if it is unfinished."""
    result = read_json(file, "step", "samples_seen")
    run = read_run_config(file.parent)
    try:
        row = of_run(run, end := run["steps"])
    except (LookupError, ValueError, TypeError, AttributeError) as error:
        raise InputError(f"no config.json of a run beside it ({error!r})") from error
    if result["step"] != end:  # --stop-after has stopped it
        raise InputError(f"stopped at step {result['step']} of {end}")
    watched = {line["step"]: line for line in read_rows(file.parent / WATCHED)}
    if watched and end not in watched:
        raise InputError(f"its watcher has evaluated up to step {max(watched)} of {end}")
    if reason := watched.get(end, {}).get("skipped"):
        raise InputError(f"its watcher skipped step {end}: {reason}")
    if reason := result.get("failed") or watched.get(end, {}).get("failed"):
        raise InputError(f"its evaluation of step {end} failed: {reason}")
    row |= {"source": str(file.parent), "samples_seen": result.pop("samples_seen")}
    return row | {key: value for key, value in result.items() if isinstance(value, int | float)}


def of_run(run: dict[str, Any], step: int) -> Row:
    """Return the columns that follow from a run's config and its last step.

    Raises LookupError, TypeError or ValueError for an invalid config.
    """
    config = from_dict(Config, run)
    model = config.model
    optim = config.optim
    work = config.flops_after
    first = branch_point(config.branch_from)[1] if config.branch_from else 0
    source = run.get("data", {}).get("source", {})
    losses = [term["type"] for term in run.get("objective", [])]
    teachers = [x for term in config.objective for x in getattr(term, "teachers", ())]
    taught = flops.of_step(config).teacher
    decoder = (run["model"].get("decoder") or {}).get("type", "").removesuffix("Config")
    schedule = run["optim"].get("schedule", {}).get("type", "Cosine")
    return {
        "arch": zoo.name_of(model),
        "samples_seen": config.samples_after(step),
        "gmacs_per_sample": gmacs(model),
        "mparams": round(mparams(model), 6),
        "training_flops": work(step),
        "student_flops": work(step) - taught * config.samples_after(step) // config.batch_size,
        "flops_spent": max(work(step) - work(first), 0),  # without the parent run's
        "family": decoder or ("SigLIP" if "SigmoidConfig" in losses else "CLIP"),
        "data": source.get("path") or source.get("type", "").removesuffix("Config").lower(),
        "teacher": "+".join(getattr(x, "weights", "stored") for x in teachers) or "none",
        "schedule": re.sub(r"(?<=[a-z])(?=[A-Z])", "_", schedule).lower(),
        "seed": config.seed,
        "global_batch": config.batch_size,
        "lr": optim.learning_rate,
        "warmup": optim.warmup_steps,
        "weight_decay": optim.weight_decay,
        "width": model.vision.width,
    }
