"""Divide compute between model size and samples by the three approaches of Hoffmann et al. 2022.

The paper (arXiv:2203.15556, section 3) finds how the best size N and the best number of samples D
grow with compute C = N · D:

1. `envelope`: along the curve of each size, the size with the lowest error at each C.
2. `isoflop`: the minimum of a parabola of the error over log N, at each of several C.
3. `parametric`: the additive law, by Huber's loss of log E.

Each approach gives a line of log N over log C. Its intervals come from fits to 80% of the points at
a time, as in the paper, scaled to the complete table (delete-d jackknife, Shao and Wu 1989).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import optimize, special

from clip_jax.errors import InputError, check_ranges
from clip_jax.scaling import run_table
from clip_jax.scaling.fit import FitConfig
from clip_jax.scaling.laws import TRAINING_FLOPS, Additive, Runs
from clip_jax.scaling.run_table import MOST_FLOPS, Selection, short
from clip_jax.scaling.uncertainty import averaged
from clip_jax.storage.files import AnyPath

Approach = Literal["envelope", "isoflop", "parametric"]

COMPUTES = 1500  # evenly spaced in log C, at which approach 1 looks for the best size
BUDGETS = 9  # at which approach 2 interpolates if no runs have equal compute
NEAR = 10.0  # factor around the best size, within which the error is about a parabola
SAME_BUDGET = 0.1  # relative difference of compute within a budget
SAME_SIZE = 0.02  # relative difference of sizes that are one
HUBER = 1e-3  # residual of log E above which the loss of approach 3 is linear
EXPONENTS = (0.1, 0.3, 0.8)  # at which the search of approach 3 starts
SHARE = 0.8  # of the points, in each of the fits that give an interval
QUANTILE = float(special.ndtri(0.975))


@dataclass(frozen=True, kw_only=True)
class DivideConfig(Selection):
    """Divide compute between model size and samples, by three published approaches."""

    table: AnyPath = Path("scaling.csv")  # Table of runs (CSV), as written by `scale collect`.
    metric: str = "imagenet1k_acc1"  # Column with the result of each run.
    metric_is: Literal["score", "error"] | None = None  # Kind of metric. None: by its name.
    # Approaches of Hoffmann et al. 2022. envelope: the best size along the curves of all sizes.
    # isoflop: a parabola over the sizes at each compute. parametric: the additive law.
    approaches: tuple[Approach, ...] = ("envelope", "isoflop", "parametric")
    # Training FLOPs to divide, such as 1e21. None: the largest of the runs.
    budget: float | None = None
    draws: int = 200  # Number of fits to 80% of the points, for the intervals.

    def __post_init__(self) -> None:
        check_ranges(self, budget=f"[1, {MOST_FLOPS:g}]", draws="[20, 100000]")
        if not self.approaches:
            raise InputError("approaches is empty; name envelope, isoflop or parametric.")


class Line(NamedTuple):
    """The best size: log N = height + slope · log C."""

    height: float
    slope: float

    def at(self, compute: float) -> float:
        return self.height + self.slope * float(np.log(compute))


class Lacking(Exception):
    """The points do not determine the best size; the message says which runs would."""


class Curves(NamedTuple):
    """The errors of S sizes along samples."""

    size: Float[np.ndarray, " S"]
    points: Sequence[tuple[np.ndarray, np.ndarray]]  # log C and log E of each size, by compute

    def errors(self, compute: Float[np.ndarray, " C"]) -> Float[np.ndarray, "S C"]:
        """Interpolate in log-log; NaN beyond the runs of a size."""
        log = np.log(compute)
        rows = [np.exp(np.interp(log, *x, left=np.nan, right=np.nan)) for x in self.points]
        return np.stack(rows)


def divide(config: DivideConfig) -> dict[str, Any]:
    """Return the exponents and the best division of a budget by each approach, as JSON values.

    Raises InputError for a table without the columns, or if no approach has an answer.
    """
    law = FitConfig(metric=config.metric, metric_is=config.metric_is)
    table = run_table.read(config.table, config.columns).select(config.metric, config.where)
    runs = law.runs(table)
    if not (runs.error > 0).all():
        raise InputError(f"errors must be positive, but the lowest is {runs.error.min()}.")
    points = averaged(runs).runs
    largest = float(runs.compute.max())
    budget = config.budget / TRAINING_FLOPS if config.budget else largest
    results = [_division(name, points, budget, config.draws) for name in config.approaches]
    if all(result["lacking"] for result in results):
        reasons = "; ".join(f"{x['approach']}: {x['lacking']}" for x in results)
        raise InputError(
            f"these {len(runs.error)} runs determine no division of compute. {reasons}."
        )
    return {
        "metric": config.metric,
        "runs": len(runs.error),
        "training_flops": budget * TRAINING_FLOPS,
        "extrapolates": budget > (1 + SAME_BUDGET) * largest,
        "approaches": results,
    }


def _division(approach: Approach, points: Runs, budget: float, draws: int) -> dict[str, Any]:
    """Fit one approach to the points, and to draws of 80% of them."""
    fit: Callable[[Runs], Line] = METHODS[approach]
    try:
        line = fit(points)
    except Lacking as error:
        return {"approach": approach, "lacking": str(error)}
    if approach == "parametric":
        fit = functools.partial(parametric, start=huber_law(points))
    n = len(points.error)
    count = max(round(SHARE * n), 1)
    rng = np.random.default_rng(0)
    lines = []
    for _ in range(draws):
        try:
            lines.append(fit(points.where(rng.permutation(n)[:count])))
        except Lacking:
            continue
    if len(lines) < draws / 2:
        return {"approach": approach, "lacking": "more runs, for an interval"}
    reach = QUANTILE * np.sqrt(count / (n - count))
    half = reach * float(np.std([x.slope for x in lines]))
    spread = float(np.exp(reach * np.std([x.at(budget) for x in lines])))
    size = float(np.exp(line.at(budget)))
    samples = budget / size
    return {
        "approach": approach,
        "lacking": None,
        "size_exponent": _estimate(line.slope, line.slope - half, line.slope + half),
        "samples_exponent": _estimate(1 - line.slope, 1 - line.slope - half, 1 - line.slope + half),
        "size": _estimate(size, size / spread, size * spread),
        "samples": _estimate(samples, samples / spread, samples * spread),
    }


def _estimate(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "interval": [low, high]}


# ------------------------------------------------------------------ the approaches


def envelope(points: Runs) -> Line:
    """Fit the size with the lowest error at each compute (approach 1).

    Only computes count at which the next smaller and the next larger size are measured and worse.
    """
    curves = _curves(points)
    compute = np.geomspace(points.compute.min(), points.compute.max(), COMPUTES)
    errors = curves.errors(compute)
    best = np.where(np.isnan(errors), np.inf, errors).argmin(axis=0)
    inner = (best > 0) & (best < len(curves.size) - 1)
    near = np.clip(best + np.array([[-1], [1]]), 0, len(curves.size) - 1)
    inner &= np.isfinite(np.take_along_axis(errors, near, axis=0)).all(axis=0)
    if len({*best[inner].tolist()}) < 3:
        raise Lacking("runs of at least five sizes, each of which is the best one at some compute")
    return _line(compute[inner], curves.size[best[inner]])


def isoflop(points: Runs) -> Line:
    """Fit the minima of parabolas of the error over log N, one for each budget (approach 2).

    Budgets are computes of which runs of three sizes differ by less than 10%. If a table has fewer
    than three, the errors are interpolated along the samples of each size.
    """
    profiles = _measured(points)
    minima = [x for x in map(_minimum, profiles) if x]
    if len(minima) < 3:
        minima = [x for x in map(_minimum, _interpolated(points)) if x]
    if len(minima) < 3:
        raise Lacking("runs of at least three sizes, around the best one, at three computes")
    compute, size = np.array(minima).T
    return _line(compute, size)


def parametric(points: Runs, start: Additive | None = None) -> Line:
    """Fit the additive law by Huber's loss of log E (approach 3); a search begins at `start`."""
    if min(points.values("size"), points.values("samples")) < 3 or len(points.error) < 6:
        raise Lacking("at least six runs, of three sizes and three numbers of samples")
    law = huber_law(points, start)
    size = law.optimum(np.array([1.0, np.e]), (0.0, np.inf)).size
    height, next_height = np.log(size).tolist()
    if not np.isfinite([height, next_height]).all():
        raise Lacking("a wider range of sizes and samples")
    return Line(height, next_height - height)


METHODS: dict[Approach, Callable[[Runs], Line]] = {
    "envelope": envelope,
    "isoflop": isoflop,
    "parametric": parametric,
}


def _line(compute: np.ndarray, size: np.ndarray) -> Line:
    slope, height = np.polyfit(np.log(compute), np.log(size), 1)
    return Line(float(height), float(slope))


def _groups(values: Float[np.ndarray, " n"], width: float) -> Int[np.ndarray, " n"]:
    """Number the groups of values, each of which spans at most a relative width."""
    order = np.argsort(values)
    group = np.zeros(len(values), int)
    first, number = values[order[0]], 0
    for i in order:
        if values[i] > (1 + width) * first:
            first, number = values[i], number + 1
        group[i] = number
    return group


def _curves(points: Runs) -> Curves:
    """Return the curve of each size: the lowest error at each compute."""
    sizes = []
    curves = []
    group = _groups(points.size, SAME_SIZE)
    for number in range(group.max() + 1):
        of_size = points.where(group == number)
        order = np.lexsort((of_size.error, of_size.compute))
        compute, first = np.unique(of_size.compute[order], return_index=True)
        sizes.append(np.exp(np.log(of_size.size).mean()))
        curves.append((np.log(compute), np.log(of_size.error[order][first])))
    return Curves(np.array(sizes), curves)


Profile = tuple[float, np.ndarray, np.ndarray]  # compute, sizes and errors of a budget


def _measured(points: Runs) -> list[Profile]:
    """Return the budgets at which runs of three sizes were trained."""
    group = _groups(points.compute, SAME_BUDGET)
    profiles = []
    for number in range(group.max() + 1):
        of_budget = points.where(group == number)
        if of_budget.values("size") >= 3:
            compute = float(np.exp(np.log(of_budget.compute).mean()))
            profiles.append((compute, of_budget.size, of_budget.error))
    return profiles


def _interpolated(points: Runs) -> list[Profile]:
    """Return budgets between the runs, with interpolated errors of sizes near the best one."""
    curves = _curves(points)
    compute = np.geomspace(points.compute.min(), points.compute.max(), BUDGETS + 2)[1:-1]
    errors = curves.errors(compute).T
    best = curves.size[np.where(np.isnan(errors), np.inf, errors).argmin(axis=1)]
    near = np.abs(np.log(curves.size / best[:, None])) < np.log(NEAR)
    near &= np.isfinite(errors)
    each = zip(compute.tolist(), errors, near, strict=True)
    return [(c, curves.size[has], error[has]) for c, error, has in each if has.sum() >= 3]


def _minimum(profile: Profile) -> tuple[float, float] | None:
    """Return compute and the size with the lowest error; None if it is not between sizes."""
    compute, size, error = profile
    log = np.log(size)
    centre = log.mean()
    bend, slope, _ = np.polyfit(log - centre, error, 2)
    if bend <= 0:
        return None
    best = float(np.exp(centre - slope / (2 * bend)))
    return (compute, best) if size.min() < best < size.max() else None


def huber_law(points: Runs, start: Additive | None = None) -> Additive:
    """Fit the additive law by Huber's loss of log E, by L-BFGS from one or several starts.

    The parameters are logarithms: of both exponents, of the terms at the centre of the runs, and of
    the irreducible error.
    """
    log_size, log_samples, log_error = map(np.log, (points.size, points.samples, points.error))
    centres = log_size.mean(), log_samples.mean()
    away = log_size - centres[0], log_samples - centres[1]

    def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
        exponents = np.exp(np.clip(values[:2], -10, 3))
        terms = np.stack(
            [
                values[2] - exponents[0] * away[0],
                values[3] - exponents[1] * away[1],
                np.full_like(log_error, values[4]),
            ]
        )
        predicted = special.logsumexp(terms, axis=0)
        off = predicted - log_error
        shares = np.exp(terms - predicted)
        slope = np.clip(off, -HUBER, HUBER) / HUBER
        gradient = shares @ slope
        by_exponents = [
            -(slope * shares[i] * away[i] * exponents[i]).sum() * (-10 < values[i] < 3)
            for i in (0, 1)
        ]
        return special.huber(HUBER, off).sum() / HUBER, np.array([*by_exponents, *gradient])

    third = np.log(np.median(points.error) / 3)
    starts = [
        np.array([np.log(a), np.log(b), third, third, third])
        for a, b in itertools.product(EXPONENTS, EXPONENTS)
    ]
    if start is not None:
        a, b, *coefficients = np.array([*start.parameters.values()])
        shifts = np.array([-a * centres[0], -b * centres[1], 0.0])
        coefficients = np.log(np.maximum(coefficients, 1e-300))
        starts = [np.array([*np.log([a, b]), *(coefficients + shifts)])]
    options = {"maxiter": 2_000, "ftol": 1e-12, "gtol": 1e-9}
    solved = [
        optimize.minimize(loss, x, jac=True, method="L-BFGS-B", options=options) for x in starts
    ]
    best = min(solved, key=lambda x: x.fun).x
    size_alpha, samples_alpha = np.exp(np.clip(best[:2], -10, 3))
    return Additive(
        size_alpha=size_alpha,
        samples_alpha=samples_alpha,
        size_scale=np.exp(best[2] + size_alpha * centres[0]),
        samples_scale=np.exp(best[3] + samples_alpha * centres[1]),
        irreducible=np.exp(best[4]),
    )


# ------------------------------------------------------------------ for a terminal


def describe(result: dict[str, Any]) -> str:
    """Format the result of `divide` as text."""

    def between(estimate: dict[str, Any], form: Callable[[float], str]) -> str:
        low, high = estimate["interval"]
        return f"{form(estimate['value'])} (95%: {form(low)} to {form(high)})"

    lines = [
        f"{result['metric']}: best division of compute by {result['runs']} runs; N in forward "
        "GMACs of a pair, D in pairs"
    ]
    for x in result["approaches"]:
        if x["lacking"]:
            lines.append(f"  {x['approach']:10} not determined; it takes {x['lacking']}")
            continue
        size, samples = (between(x[f"{y}_exponent"], "{:.2f}".format) for y in ("size", "samples"))
        lines.append(f"  {x['approach']:10} N grows as C^{size}, D as C^{samples}")
    mark = "; EXTRAPOLATES" if result["extrapolates"] else ""
    lines.append(f"best for {result['training_flops']:.3g} training FLOPs{mark}:")
    for x in result["approaches"]:
        if not x["lacking"]:
            size, samples = between(x["size"], "{:.3g}".format), between(x["samples"], short)
            lines.append(f"  {x['approach']:10} N {size}, D {samples}")
    return "\n".join(lines)
