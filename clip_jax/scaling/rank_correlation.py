"""Correlate the ranks of methods between scales: does what is best for small runs stay the best?

DataComp (Gadre et al. 2023, arXiv:2304.14108, section 5) compares ways to filter data by small runs
where ranks at a small and a large scale agree. Intervals are those of a bootstrap over methods.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from clip_jax.errors import InputError, check_ranges
from clip_jax.scaling import run_table
from clip_jax.scaling.run_table import RunTable, Selection, is_score, text
from clip_jax.storage.files import AnyPath

FEWEST = 3  # methods that two scales must share
NAMES = ("Spearman", "Kendall")


@dataclass(frozen=True, kw_only=True)
class RanksConfig(Selection):
    """Correlate the ranks of methods between two or more scales."""

    table: AnyPath  # Table of runs (CSV), with a row per method and scale, or several.
    metric: str  # Column with the result of each run. Runs of one method and scale are averaged.
    metric_is: Literal["score", "error"] | None = None  # Kind of metric. None: by its name.
    methods: str  # Column that names the methods to rank, such as filter or data.
    # Column that names the scales, such as scale, or a condition for each scale, as those of where:
    # 'samples_seen<=1e8' 'samples_seen>1e8'.
    scales: tuple[str, ...] = ("scale",)
    draws: int = 2_000  # Number of bootstrap draws, for the intervals.

    def __post_init__(self) -> None:
        check_ranges(self, draws="[100, 1000000]")
        if not self.scales:
            raise InputError("scales is empty; name a column, or a condition for each scale.")


def ranks(config: RanksConfig) -> dict[str, Any]:
    """Return values and ranks of the methods, and correlations of each pair, as JSON values.

    Raises InputError for a table without the columns, and for fewer than two scales that share
    three methods.
    """
    table = run_table.read(config.table, config.columns)
    table.check(config.metric, option="--metric")
    table.check(config.methods, option="--methods")
    meets = zip(table.rows, table.meets(config.where), strict=True)
    rows = [row for row, is_met in meets if is_met and text(row, config.metric)]
    scales = _scales(RunTable(rows), config.scales)
    sign = 1 if is_score(config.metric, config.metric_is) else -1
    values = {name: _means(x, config.methods, config.metric) for name, x in scales.items()}
    pairs = [
        _pair(names, [values[name] for name in names], sign, config.draws)
        for names in itertools.combinations(values, 2)
    ]
    pairs = [pair for pair in pairs if pair]
    if not pairs:
        counts = ", ".join(f"{name} ({len(x)})" for name, x in values.items())
        raise InputError(
            f"no two scales share {FEWEST} methods of {config.methods}; the scales are "
            f"{counts or 'none'}. Change --scales, --methods or --where."
        )
    return {
        "metric": config.metric,
        "methods": _ranked(values, sign),
        "scales": list(values),
        "pairs": pairs,
    }


def _scales(table: RunTable, names: Sequence[str]) -> dict[str, RunTable]:
    """Return the runs of each scale: of a column's values, or by a condition each."""
    if len(names) == 1:
        (column,) = names
        table.check(column, option="--scales")
        groups = table.groups(lambda row: text(row, column))
        return {name: rows for name, rows in groups.items() if name}
    selected = {}
    for condition in names:
        meets = zip(table.rows, table.meets([condition]), strict=True)
        selected[condition] = RunTable([row for row, is_met in meets if is_met])
    return selected


def _means(table: RunTable, column: str, metric: str) -> dict[str, float]:
    """Return the mean of each method."""
    groups = table.groups(lambda row: text(row, column))
    return {name: float(x.numbers(metric).mean()) for name, x in groups.items() if name}


def _ranked(values: dict[str, dict[str, float]], sign: int) -> list[dict[str, Any]]:
    """Return every method with its values and ranks (1 is the best), the best at the last first."""
    of_scale = {}
    for scale, means in values.items():
        numbers = stats.rankdata([-sign * x for x in means.values()], method="min")
        of_scale[scale] = dict(zip(means, map(int, numbers), strict=True))
    methods = dict.fromkeys(name for means in values.values() for name in means)
    rows = [
        {
            "method": method,
            "values": {scale: means.get(method) for scale, means in values.items()},
            "ranks": {scale: x.get(method) for scale, x in of_scale.items()},
        }
        for method in methods
    ]
    last = [*values][-1]
    return sorted(rows, key=lambda row: row["ranks"][last] or len(rows) + 1)


def _pair(
    names: tuple[str, str], means: Sequence[dict[str, float]], sign: int, draws: int
) -> dict[str, Any] | None:
    """Correlate the methods that two scales share; None for fewer than three."""
    shared = [name for name in means[0] if name in means[1]]
    if len(shared) < FEWEST:
        return None
    first, second = (np.array([x[name] for name in shared]) for x in means)
    n = len(shared)
    drawn = np.random.default_rng(0).integers(n, size=(draws, n))
    every = np.concatenate([np.arange(n)[None], drawn])
    best = shared[int(np.argmax(sign * first))]
    better = int((sign * second > sign * second[shared.index(best)]).sum())
    return {
        "scales": list(names),
        "methods": n,
        "spearman": _estimate(spearman(first, second, every)),
        "kendall": _estimate(kendall(first, second, every)),
        "best": best,
        "rank_of_best": 1 + better,
    }


def _estimate(draws: Float[np.ndarray, " R"]) -> dict[str, Any]:
    """Return the first value, and the central 95% of the others; None for what is undefined.

    Methods whose order is the same at both scales have no interval: every draw of them agrees.
    """
    value, *others = draws.tolist()
    if np.isnan(value):  # all methods of a scale are equal
        return {"value": None, "interval": None}
    defined = [x for x in others if not np.isnan(x)]
    low, high = np.quantile(defined or [value], [0.025, 0.975]).tolist()
    return {"value": value, "interval": [low, high] if low < high else None}


def spearman(
    first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"], draws: Int[np.ndarray, "R n"]
) -> Float[np.ndarray, " R"]:
    """Return Spearman's ρ of each draw of methods; NaN if all are equal."""
    x, y = (stats.rankdata(values[draws], axis=1) for values in (first, second))
    x, y = (each - each.mean(axis=1, keepdims=True) for each in (x, y))
    return _ratio((x * y).sum(axis=1), np.square(x).sum(axis=1) * np.square(y).sum(axis=1))


def kendall(
    first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"], draws: Int[np.ndarray, "R n"]
) -> Float[np.ndarray, " R"]:
    """Return Kendall's τ_b of each draw of methods; NaN if all are equal."""
    x, y = (np.sign(values[:, None] - values) for values in (first, second))
    counts = np.stack([np.bincount(draw, minlength=len(first)) for draw in draws])

    def summed(pairs: Float[np.ndarray, "n n"]) -> Float[np.ndarray, " R"]:
        return ((counts @ pairs) * counts).sum(axis=1)

    return _ratio(summed(x * y), summed(x * x) * summed(y * y))


def _ratio(
    covariance: Float[np.ndarray, " R"], square: Float[np.ndarray, " R"]
) -> Float[np.ndarray, " R"]:
    root = np.sqrt(np.where(square > 0, square, np.nan))
    return np.clip(covariance / root, -1, 1)


def describe(result: dict[str, Any]) -> str:
    """Format the correlations and the table of methods as text."""
    lines = [f"{result['metric']}: ranks of {len(result['methods'])} methods"]
    for pair in result["pairs"]:
        first, second = pair["scales"]
        words = ", ".join(f"{name} {_in_words(pair[name.lower()])}" for name in NAMES)
        lines.append(f"  {first} and {second}, {pair['methods']} methods: {words}")
        best = f"{pair['best']}, the best at {first}, is number {pair['rank_of_best']} at {second}"
        lines.append(f"    {best}")
    rows = [["method", *result["scales"]]]
    for row in result["methods"]:
        cells = zip(row["values"].values(), row["ranks"].values(), strict=True)
        shown = ["-" if value is None else f"{value:.4g} ({rank})" for value, rank in cells]
        rows.append([row["method"], *shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        values = map(str.rjust, cells, widths[1:])
        lines.append("  ".join([name.ljust(widths[0]), *values]))
    return "\n".join(lines)


def _in_words(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "not determined"
    if estimate["interval"] is None:
        return f"{estimate['value']:.2f} (95%: unknown)"
    low, high = estimate["interval"]
    return f"{estimate['value']:.2f} (95%: {low:.2f} to {high:.2f})"
