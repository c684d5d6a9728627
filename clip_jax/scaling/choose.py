"""Choose the best trial of each point of a sweep; fit a rule for learning rates across sizes.

The rule is learning rate = exp(a) · width^b · batch^c, a straight line in logarithms, fitted to the
optima of the smaller widths and checked on the largest. The optimum of a point and seed is the
vertex of the parabola through the best learning rate and its two neighbours. Each is an
observation, and intervals are Student's t.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from clip_jax.errors import InputError
from clip_jax.scaling import run_table
from clip_jax.scaling.downstream import Linear, least_squares
from clip_jax.scaling.run_table import Row, RunTable, Selection, number, short
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

SWEPT = {"lr": "learning rate", "global_batch": "batch", "warmup": "warm-up"}
SWEPT |= {"weight_decay": "weight decay"}
BETWEEN = "{:.3g} [{:.3g}, {:.3g}]"  # a value and its interval


@dataclass(frozen=True, kw_only=True)
class ChooseConfig(Selection):
    """Choose the best trial of every point of a sweep, and fit the rule for learning rates."""

    table: AnyPath  # Table of all trials (CSV), as written by `scale collect`.
    choose_by: str  # Column by which trials are compared, such as info_nce.
    report: str  # Column to report for the best trials; not choose_by, to avoid selection bias.
    best: Literal["min", "max"] = "min"  # Whether the best choose_by is the lowest or the highest.
    output: AnyPath | None = None  # Table of the best trials to write for `scale fit`. None: none.

    def __post_init__(self) -> None:
        if self.choose_by == self.report:
            raise InputError(
                f"choose_by and report are both {self.report!r}, which biases the reported value; "
                "set --report to a different metric, or to one on different data."
            )

    def loss(self, row: Row) -> float:
        """Return a value of choose_by that is lowest for the best trial."""
        value = number(row, self.choose_by)
        return value if self.best == "min" else -value


def choose(config: ChooseConfig) -> dict[str, Any]:
    """Return the best trial of every point, and the rule with its check, as JSON values.

    Raises InputError for a table without the columns of a sweep.
    """
    files.check_destination(config.output, "--output", folder=False)
    table = run_table.read(config.table, config.columns).select(config.choose_by, config.where)
    table.check(*SWEPT, "width", "seed", config.report)
    for name in ("width", "samples_seen", *SWEPT):
        table.bounded(name, 0.0 if name in ("warmup", "weight_decay") else run_table.LEAST)
    points = table.groups(lambda row: (row["arch"], short(number(row, "samples_seen"))))
    choices = [_best(point, config) for point in points.values()]
    if config.output:
        run_table.write(RunTable([row for _, rows in choices for row in rows]), config.output)
    result = [point for point, _ in choices]
    names = {"choose_by": config.choose_by, "report": config.report}
    return {**names, "points": result, "rule": _rule(result)}


def _best(point: RunTable, config: ChooseConfig) -> tuple[dict[str, Any], Sequence[Row]]:
    """Choose the trial of a point by its mean over seeds; return JSON values, and its runs.

    Of equal trials that of the lowest learning rate, then batch, warm-up and weight decay is the
    best.
    """
    groups = point.groups(lambda row: tuple(number(row, name) for name in SWEPT))
    for group in groups.values():
        _check_seeds(group)
    trials = {trial: group.rows for trial, group in groups.items()}
    seeds = max(map(len, trials.values()))
    losses = {}
    for trial, rows in trials.items():
        if len(rows) < seeds:  # diverged with some seed
            continue
        loss = float(np.mean([config.loss(row) for row in rows]))
        if math.isfinite(loss):
            losses[trial] = loss
    if not losses:
        row = point.rows[0]
        raise InputError(
            f"no trial of {row['arch']} with {row['samples_seen']} samples has a finite "
            f"{config.choose_by} with every seed; sweep lower learning rates."
        )
    best = min(losses, key=lambda trial: (losses[trial], trial))
    edges = []
    for i, what in enumerate(SWEPT.values()):
        values = set()
        for trial in trials:
            others_are_best = trial[:i] + trial[i + 1 :] == best[:i] + best[i + 1 :]
            if what == "batch" or others_are_best:  # learning rates and warm-ups depend on it
                values.add(trial[i])
        if len(values) > 1 and best[i] == min(values):
            edges.append(f"{what}: lowest")
        elif len(values) > 1 and best[i] == max(values):
            edges.append(f"{what}: highest")
    learning_rates = sorted(trial[0] for trial in losses if trial[1:] == best[1:])
    optima = []
    for seed in sorted({row["seed"] for row in trials[best]}):
        rows = []
        for lr in learning_rates:
            rows += [row for row in trials[(lr, *best[1:])] if row["seed"] == seed]
        if len(rows) == len(learning_rates):
            optima.append(vertex(learning_rates, list(map(config.loss, rows))))
    factor = max((b / a for a, b in itertools.pairwise(learning_rates)), default=math.nan)
    metrics = {}
    row = point.rows[0]
    for name in (config.choose_by, config.report):
        rows = [row for row in trials[best] if run_table.text(row, name)] or trials[best]
        values = RunTable(rows).numbers(name)
        std = float(values.std(ddof=1)) if len(values) > 1 else None
        metrics[name] = {"mean": float(values.mean()), "sd": std}
    described = {
        "arch": row["arch"],
        "width": number(row, "width"),
        "samples_seen": number(row, "samples_seen"),
        **dict(zip(SWEPT, best, strict=True)),
        "trials": len(trials),
        "seeds": seeds,
        "optima": optima,
        "edges": edges,
        "metrics": metrics,
        "grid_factor": factor,  # ratio of neighbouring learning rates
    }
    return described, trials[best]


def _check_seeds(trial: RunTable) -> None:
    """Raise InputError if a trial has two runs with one seed: they differ in what is not swept."""
    first, *_ = trial.rows
    for seed, group in trial.groups(lambda row: row["seed"]).items():
        if len(group.rows) > 1:
            names = [
                name
                for name in sorted(trial.columns)
                if len({run_table.text(row, name) for row in group.rows}) > 1
            ]
            settings = ", ".join(f"{name} {run_table.text(first, name)}" for name in SWEPT)
            raise InputError(
                f"{len(group.rows)} runs of {first['arch']} with {settings} have the seed {seed}, "
                f"and one is expected; they differ in {', '.join(names) or 'nothing'}. Select "
                "runs with equal settings by --where."
            )


def vertex(learning_rates: Sequence[float], values: Sequence[float]) -> float:
    """Find the minimum of the parabola, in log, through the best value and its neighbours.

    At an edge of the grid it is the best learning rate itself.
    """
    best = int(np.argmin(values))
    if not 0 < best < len(learning_rates) - 1:
        return learning_rates[best]
    x = np.log(learning_rates[best - 1 : best + 2])
    a, b, _ = np.polyfit(x - x[1], values[best - 1 : best + 2], 2)
    return float(np.exp(x[1] - b / (2 * a))) if a > 0 else learning_rates[best]


def fit_rule(optima: Sequence[tuple[float, float, float]]) -> Linear | None:
    """Fit the rule to widths, batches and learning rates of optima; None if there are too few."""
    logs = np.log(np.reshape(optima, (-1, 3)))
    varies = (logs != logs[:1]).any(axis=0)[:2]
    if not varies[0] or len(logs) <= 1 + varies.sum():
        return None
    return least_squares(np.insert(logs[:, :2] * varies, 0, 1.0, axis=1), logs[:, 2])


def learning_rate(rule: Linear, width: float, batch: float) -> list[float]:
    """Return the rule's learning rate, and the ends of the 95% interval of one run's optimum."""
    middle, half = rule.predict(np.log([math.e, width, batch]))
    return np.exp([middle, middle - half, middle + half]).tolist()


def _rule(points: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Fit the rule to all but the largest width, and check it on that one."""
    widths = sorted({point["width"] for point in points})
    largest = widths[-1]
    smaller = [point for point in points if point["width"] < largest]
    optima = [
        (point["width"], point["global_batch"], optimum)
        for point in smaller
        for optimum in point["optima"]
    ]
    rule = fit_rule(optima)
    if rule is None:
        return None
    checks = []
    for point in points:
        if point["width"] < largest:
            continue
        predicted, *interval = learning_rate(rule, point["width"], point["global_batch"])
        measured = float(np.exp(np.mean(np.log(point["optima"]))))
        checks.append(
            {
                "arch": point["arch"],
                "width": point["width"],
                "batch": point["global_batch"],
                "predicted": predicted,
                "interval": interval,
                "measured": measured,
                "grid_steps": abs(math.log(predicted / measured)) / math.log(point["grid_factor"]),
            }
        )
    batch = next(x["global_batch"] for x in smaller if x["width"] == widths[0])
    exponents = {"width_exponent": rule.coefficient(1)}
    if len({batch for _, batch, _ in optima}) > 1:
        exponents["batch_exponent"] = rule.coefficient(2)
    return {
        **{name: value for name, (value, _) in exponents.items()},
        "intervals": {name: [x - half, x + half] for name, (x, half) in exponents.items()},
        "learning_rate": learning_rate(rule, widths[0], batch)[0],
        "reference_width": widths[0],
        "reference_batch": batch,
        "observations": len(optima),
        "checks": checks,
    }


def describe(result: dict[str, Any]) -> str:
    """Format the best trials, then the rule and its check, as text."""
    lines = [f"chosen by {result['choose_by']} (mean over seeds), reporting {result['report']}"]
    for point in result["points"]:
        swept = ", ".join(f"{what} {point[name]:g}" for name, what in SWEPT.items())
        values = [
            f"{name} {x['mean']:.4g}" + ("" if x["sd"] is None else f" ± {x['sd']:.2g}")
            for name, x in point["metrics"].items()
        ]
        lines.append(
            f"{point['arch']} @ {short(point['samples_seen'])}: {swept} (of "
            f"{point['trials']} trials, {point['seeds']} seeds): {', '.join(values)}"
        )
        edges = point["edges"]
        lines += [f"  AT THE EDGE of the grid, {x}: the optimum may be outside" for x in edges]
    if (rule := result["rule"]) is None:
        lines.append("no rule for learning rates: fewer than two widths below the largest")
        return "\n".join(lines)
    law = f"rule: learning rate = {rule['learning_rate']:.3g}"
    for name in ("width", "batch"):
        if interval := rule["intervals"].get(f"{name}_exponent"):
            exponent = BETWEEN.format(rule[f"{name}_exponent"], *interval)
            law += f" · ({name} / {rule[f'reference_{name}']:g})^{exponent}"
    lines.append(f"{law}, from {rule['observations']} optima of all but the largest width")
    lines += [
        f"at width {check['width']:g}, batch {check['batch']:g} it predicts "
        f"{BETWEEN.format(check['predicted'], *check['interval'])}; measured "
        f"{check['measured']:.3g}, {check['grid_steps']:.2f} grid steps away"
        for check in rule["checks"]
    ]
    return "\n".join(lines)
