"""What a sweep found: the best trial of each point, and a rule for rates across sizes.

The rule is rate = exp(a) · width^b · batch^c, a straight line through logarithms, fitted to the
optima of the smaller widths and held against the largest. A point's optimum is the vertex of the
parabola through the best rate and its two neighbours, for each seed alone; seeds are the
observations, and intervals are Student's.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

from clip_jax.errors import InputError
from clip_jax.scaling import table
from clip_jax.storage import files
from clip_jax.storage.files import Place

SWEPT = {"lr": "rate", "global_batch": "batch", "warmup": "warm-up", "weight_decay": "weight decay"}


@dataclass(frozen=True, kw_only=True)
class ChooseConfig:
    """Choose the best trial of every point of a sweep, and fit the rule for rates."""

    table: Place  # what `scale collect` has written, all trials in it
    choose_by: str  # column by which trials are compared, such as info_nce
    report: str  # column that is reported of the chosen; never the same: the best of many is lucky
    best: Literal["min", "max"] = "min"  # of choose_by
    where: tuple[str, ...] = ()  # COLUMN=PATTERN, all of which a row must match
    output: Place | None = None  # a table of the chosen trials' runs alone, for `scale fit`

    def __post_init__(self) -> None:
        if self.choose_by == self.report:
            raise InputError(
                f"choose_by and report are both {self.report!r}: the best of many trials by a "
                "metric is partly luck in it; report another one, or one of other data."
            )


class Choice(NamedTuple):
    """A point's best trial."""

    arch: str
    width: float
    samples: float
    trial: dict[str, float]  # rate, batch, warm-up and weight decay by their columns
    trials: int  # of the point
    rows: list[dict[str, str]]  # the trial's runs, one a seed
    edges: list[str]  # what lies at the edge of the grid: "rate: highest"
    optima: list[float]  # best rate of each seed, between those of the grid
    factor: float  # between rates of the grid; NaN where only one was tried


class Rule(NamedTuple):
    """rate = exp(coefficients · (1, ln width, ln batch)); a column that never varies has 0."""

    coefficients: Float[np.ndarray, " 3"]
    covariance: Float[np.ndarray, "3 3"]
    variance: float  # of ln rate around the rule
    freedom: int
    observations: int

    def predict(self, width: float, batch: float) -> tuple[float, float, float]:
        """Return the rate, and where the optimum of one more run lies in 95 of 100 cases."""
        x = np.array([1.0, math.log(width), math.log(batch)])
        middle = float(x @ self.coefficients)
        half = self._t * math.sqrt(float(x @ self.covariance @ x) + self.variance)
        return math.exp(middle), math.exp(middle - half), math.exp(middle + half)

    def exponent(self, place: int) -> tuple[float, float, float]:
        """Return the exponent of width (1) or batch (2) and its 95% interval."""
        value = float(self.coefficients[place])
        half = self._t * math.sqrt(float(self.covariance[place, place]))
        return value, value - half, value + half

    @property
    def _t(self) -> float:
        return float(stats.t.ppf(0.975, self.freedom))


def choose(config: ChooseConfig) -> dict[str, Any]:
    """Return the best trial of every point, and the rule with its check, as JSON values.

    Raises InputError for a table without the columns of a sweep.
    """
    files.check_destination(config.output, "--output", folder=False)
    rows = table.read(config.table, config.choose_by, config.where)
    for column in (*SWEPT, "width", "seed", config.report):
        if column not in rows[0]:
            raise InputError(f"{config.table} has no column {column!r}; collect the sweep anew.")
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        key = row["arch"], table.short(table.number(row, "samples_seen"))
        groups.setdefault(key, []).append(row)
    choices = [_best(group, config) for group in groups.values()]
    if config.output:
        table.write([row for choice in choices for row in choice.rows], config.output)
    return {
        "choose_by": config.choose_by,
        "report": config.report,
        "points": [_point(choice, config) for choice in choices],
        "rule": _rule(choices),
    }


def _best(group: Sequence[dict[str, str]], config: ChooseConfig) -> Choice:
    """Choose among a point's trials by the mean over their seeds."""
    sign = 1 if config.best == "min" else -1
    trials: dict[tuple[float, ...], list[dict[str, str]]] = {}
    for row in group:
        trials.setdefault(tuple(table.number(row, name) for name in SWEPT), []).append(row)
    seeds = max(map(len, trials.values()))
    scores = {
        trial: float(np.mean([sign * table.number(row, config.choose_by) for row in rows]))
        for trial, rows in trials.items()
        if len(rows) == seeds  # others diverged with some seed
    }
    scores = {trial: score for trial, score in scores.items() if math.isfinite(score)}
    if not scores:
        raise InputError(
            f"{config.table}: no trial of {group[0]['arch']} with {group[0]['samples_seen']} "
            f"samples has a finite {config.choose_by} with every seed; sweep lower rates."
        )
    best = min(scores, key=scores.__getitem__)
    edges = []
    for place, what in enumerate(SWEPT.values()):
        alike = [  # each batch has rates and warm-ups of its own
            x
            for x in trials
            if what == "batch" or all(x[i] == best[i] for i in range(len(best)) if i != place)
        ]
        beside = sorted({x[place] for x in alike})
        if len(beside) > 1 and best[place] in (beside[0], beside[-1]):
            edges.append(f"{what}: {'lowest' if best[place] == beside[0] else 'highest'}")
    rates = sorted(x[0] for x in scores if x[1:] == best[1:])
    optima = []
    for seed in sorted({row["seed"] for row in trials[best]}):
        values = [
            sign * float(row[config.choose_by])
            for rate in rates
            for row in trials[(rate, *best[1:])]
            if row["seed"] == seed
        ]
        if len(values) == len(rates):
            optima.append(vertex(rates, values))
    steps = [b / a for a, b in itertools.pairwise(rates)]
    first = trials[best][0]
    return Choice(
        first["arch"], table.number(first, "width"), table.number(first, "samples_seen"),
        dict(zip(SWEPT, best, strict=True)), len(trials), trials[best], edges, optima,
        max(steps, default=math.nan),
    )  # fmt: skip


def vertex(rates: Sequence[float], values: Sequence[float]) -> float:
    """Find where a parabola in the rate's logarithm is least, through the best and its neighbours.

    At an edge of the grid it is the best rate itself.
    """
    best = int(np.argmin(values))
    if not 0 < best < len(rates) - 1:
        return rates[best]
    x = np.log(rates[best - 1 : best + 2])
    a, b, _ = np.polyfit(x - x[1], values[best - 1 : best + 2], 2)
    return float(np.exp(x[1] - b / (2 * a))) if a > 0 else rates[best]


def fit_rule(
    widths: Sequence[float], batches: Sequence[float], rates: Sequence[float]
) -> Rule | None:
    """Fit the rule to optima, one observation each; None where there are too few."""
    x = np.stack([np.ones(len(rates)), np.log(widths), np.log(batches)], axis=1)
    used = [0, *(i for i in (1, 2) if np.ptp(x[:, i]) > 0)]
    freedom = len(rates) - len(used)
    if freedom < 1 or 1 not in used:
        return None
    y = np.log(rates)
    solution, *_ = np.linalg.lstsq(x[:, used], y, rcond=None)
    variance = float(np.sum((y - x[:, used] @ solution) ** 2) / freedom)
    coefficients, covariance = np.zeros(3), np.zeros((3, 3))
    coefficients[used] = solution
    covariance[np.ix_(used, used)] = variance * np.linalg.pinv(x[:, used].T @ x[:, used])
    return Rule(coefficients, covariance, variance, freedom, len(rates))


def _rule(choices: Sequence[Choice]) -> dict[str, Any] | None:
    """Fit the rule to all but the largest width, and hold it against that."""
    largest = max(choice.width for choice in choices)
    known = [
        (choice.width, choice.trial["global_batch"], rate)
        for choice in choices
        if choice.width < largest
        for rate in choice.optima
    ]
    rule = fit_rule(*zip(*known, strict=True)) if known else None
    if rule is None:
        return None
    checks = []
    for choice in (choice for choice in choices if choice.width == largest):
        batch = choice.trial["global_batch"]
        rate, low, high = rule.predict(choice.width, batch)
        measured = float(np.exp(np.mean(np.log(choice.optima))))
        checks.append({
            "arch": choice.arch, "width": choice.width, "batch": batch, "predicted": rate,
            "interval": [low, high], "measured": measured,
            "grid_steps": abs(math.log(rate / measured)) / math.log(choice.factor),
        })  # fmt: skip
    first = min(choices, key=lambda choice: choice.width)
    names = {"width_exponent": 1, "batch_exponent": 2}
    exponents = {
        name: rule.exponent(place)
        for name, place in names.items()
        if rule.covariance[place, place] > 0  # else it never varied
    }
    return {
        **{name: value for name, (value, _, _) in exponents.items()},
        "intervals": {name: [low, high] for name, (_, low, high) in exponents.items()},
        "rate": rule.predict(first.width, first.trial["global_batch"])[0],
        "reference_width": first.width,
        "reference_batch": first.trial["global_batch"],
        "observations": rule.observations,
        "checks": checks,
    }


def _point(choice: Choice, config: ChooseConfig) -> dict[str, Any]:
    """Say what was chosen, and what it measured in both metrics."""
    spread = {}
    for name in (config.choose_by, config.report):
        rows = [row for row in choice.rows if row[name]] or choice.rows
        values = [table.number(row, name) for row in rows]
        spread[name] = {
            "mean": float(np.mean(values)),
            "sd": float(np.std(values, ddof=1)) if len(values) > 1 else None,
        }
    return {
        "arch": choice.arch, "width": choice.width, "samples_seen": choice.samples,
        **choice.trial, "trials": choice.trials, "seeds": len(choice.rows),
        "optima": choice.optima, "edges": choice.edges, "metrics": spread,
    }  # fmt: skip


# ------------------------------------------------------------------ words


def describe(result: dict[str, Any]) -> str:
    """Write the choices as a table, then the rule and its check."""
    by, of = result["choose_by"], result["report"]
    lines = [f"chosen by {by} (mean over seeds); {of} is reported"]
    for point in result["points"]:
        swept = ", ".join(f"{what} {point[name]:g}" for name, what in SWEPT.items())
        values = (
            f"{name} {point['metrics'][name]['mean']:.4g}"
            + ("" if (sd := point["metrics"][name]["sd"]) is None else f" ± {sd:.2g}")
            for name in (by, of)
        )
        lines.append(
            f"{point['arch']} @ {table.short(point['samples_seen'])}: {swept} (of "
            f"{point['trials']} trials, {point['seeds']} seeds): {', '.join(values)}"
        )
        lines += [
            f"  AT THE EDGE of the grid, {edge}: the optimum may lie beyond"
            for edge in point["edges"]
        ]
    if (rule := result["rule"]) is None:
        return "\n".join([*lines, "no rule for rates: fewer than two widths below the largest"])
    intervals = rule["intervals"]
    law = (
        f"rule: rate = {rule['rate']:.3g} · (width / {rule['reference_width']:g})^"
        f"{_between(rule['width_exponent'], *intervals['width_exponent'])}"
    )
    if "batch_exponent" in rule:
        exponent = _between(rule["batch_exponent"], *intervals["batch_exponent"])
        law += f" · (batch / {rule['reference_batch']:g})^{exponent}"
    lines.append(f"{law}, from {rule['observations']} optima of all but the largest width")
    lines += [
        f"at width {check['width']:g}, batch {check['batch']:g} it predicts "
        f"{_between(check['predicted'], *check['interval'])}; measured {check['measured']:.3g}, "
        f"{check['grid_steps']:.2f} grid steps away"
        for check in rule["checks"]
    ]
    return "\n".join(lines)


def _between(value: float, low: float, high: float) -> str:
    return f"{value:.3g} [{low:.3g}, {high:.3g}]"
