"""Read and write tables of runs, with one row per trained model.

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
from typing import Any, Literal

import numpy as np

from clip_jax.errors import InputError
from clip_jax.scaling.columns import Row, mapped, numeric
from clip_jax.scaling.laws import Runs
from clip_jax.storage.files import AnyPath, write_whole
from clip_jax.storage.files import read as read_file
from clip_jax.storage.json_files import parse

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
            from clip_jax.models import zoo

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
    if without_size := [row for row in rows if not text(row, "gmacs_per_sample")]:
        from clip_jax.models.zoo import ARCHITECTURES

        for row in without_size:
            if text(row, "arch") in ARCHITECTURES:
                row["gmacs_per_sample"] = gmacs(ARCHITECTURES[text(row, "arch")])
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
def gmacs(config: Any) -> float:
    """Return the forward GMACs of one pair for a `CLIPConfig`, as fvcore counts them."""
    from clip_jax import flops  # imports JAX, which tables with sizes do not need

    return flops.forward(config, "fvcore").total / 1e9
