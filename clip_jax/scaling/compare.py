"""Compare the laws of two families of runs: where they cross, and which is better in between."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from clip_jax.scaling.run_table import RunTable, number, text
from clip_jax.scaling.uncertainty import LEVEL, Fit, middle, sizes_of

BEYOND = 10.0  # factor beyond the common range, on both sides, of the search for crossings
GRID = 401  # points, evenly spaced in log C, between which crossings are interpolated
SURE = 0.02  # relative difference in compute of runs that are alike


class Crossing(NamedTuple):
    """Compute at which two laws are equal, with its 95% interval."""

    compute: float
    low: float  # 0: not determined within the range searched
    high: float  # inf: not determined within the range searched
    better: int  # the family that is better at larger compute, 0 or 1
    inside: bool  # whether both families have runs on both sides of it


class Segment(NamedTuple):
    """A part of the common range in which one family is better, or which is not determined."""

    low: float
    high: float
    better: int | None


class Ratio(NamedTuple):
    """The second family's error as a multiple of the first's, at equal compute."""

    compute: float
    ratio: float
    low: float
    high: float
    share: float  # share of draws in which the second's error is lower


class Comparison(NamedTuple):
    """Two laws, each at its best division of compute."""

    segments: list[Segment]  # of the common range of compute; empty if there is none
    crossings: list[Crossing]  # of the estimates, by compute
    ratios: list[Ratio]  # at the least and the most compute of the common range
    share: float  # share of draws that cross inside the common range


def compare(first: Fit, second: Fit) -> Comparison:
    """Compare two laws over the compute that both families have runs at, and 10 times beyond.

    Where the 95% interval of the ratio of errors excludes one, the better family is determined. The
    interval of a crossing is the range around it where the interval of the ratio includes one: the
    computes at which the laws may be equal. Without a common range, that in between is searched.
    """
    least = max(fit.runs.compute.min() for fit in (first, second))
    most = min(fit.runs.compute.max() for fit in (first, second))
    ends = sorted((least, most))
    log = np.linspace(np.log(ends[0] / BEYOND), np.log(ends[1] * BEYOND), GRID)
    log = np.union1d(log, np.log(ends))
    first_errors, second_errors = _errors(first, second, np.exp(log))
    gap = np.log(first_errors / second_errors)  # [draws, C], above 0 where the second is better
    low, high = (np.asarray(x) for x in middle(gap[1:]))
    sign = np.where(low > 0, 1, np.where(high < 0, -1, 0))  # of the gap, 0: not determined
    crossings = []
    for i in np.flatnonzero(np.diff(np.sign(gap[0])) != 0):
        at = np.exp(log[i] - gap[0, i] * (log[i + 1] - log[i]) / (gap[0, i + 1] - gap[0, i]))
        determined = np.flatnonzero(sign)
        below = determined[determined <= i]
        above = determined[determined > i]
        low = float(np.exp(log[below[-1]])) if len(below) else 0.0
        high = float(np.exp(log[above[0]])) if len(above) else math.inf
        better = int(gap[0, i + 1] > 0)
        inside = bool(least <= at <= most)
        crossings.append(Crossing(float(at), low, high, better, inside))
    if least >= most:
        return Comparison([], crossings, [], 0.0)
    common = (np.log(least) <= log) & (log <= np.log(most))
    segments = _segments(np.exp(log[common]), sign[common], least, most)
    crosses = (np.diff(np.sign(gap[1:, common]), axis=1) != 0).any(1)
    ratios = _ratios(first, second, np.array([least, most]))
    return Comparison(segments, crossings, ratios, float(crosses.mean()))


def _segments(
    compute: Float[np.ndarray, " C"], sign: np.ndarray, least: float, most: float
) -> list[Segment]:
    """Divide the common range where the better family changes, or ceases to be determined."""
    edges = np.flatnonzero(np.diff(sign)) + 1
    ends = [least, *compute[edges].tolist(), most]
    better = [{1: 1, -1: 0, 0: None}[int(sign[i])] for i in (0, *edges)]
    return [Segment(*span, x) for span, x in zip(pairwise(ends), better, strict=True)]


def _errors(
    first: Fit, second: Fit, compute: Float[np.ndarray, " C"]
) -> tuple[Float[np.ndarray, "R C"], Float[np.ndarray, "R C"]]:
    """Evaluate two laws at their best divisions of compute: the estimates, then every draw."""
    sizes = sizes_of([first, second])
    errors = []
    for fit in (first, second):
        estimate, drawn = fit.best(compute, sizes)
        errors.append(np.concatenate([np.atleast_2d(estimate.error), np.atleast_2d(drawn.error)]))
    count = min(map(len, errors))
    return errors[0][:count], errors[1][:count]


def _ratios(first: Fit, second: Fit, compute: Float[np.ndarray, " C"]) -> list[Ratio]:
    first_errors, second_errors = _errors(first, second, compute)
    ratio = second_errors / first_errors
    rows = np.stack([compute, ratio[0], *middle(ratio[1:]), (ratio[1:] < 1).mean(0)])
    return [Ratio(*row) for row in rows.T.tolist()]


# ------------------------------------------------------------------ matching runs


class Paired(NamedTuple):
    """The second family's errors as multiples of the first's, in otherwise equal runs.

    The mean is geometric, with Student's t interval.
    """

    pairs: int
    ratio: float
    low: float
    high: float
    compute: float  # the second family's compute as a multiple of the first's, mean
    unequal: int  # number of pairs whose computes differ by more than 2%


def paired(
    first: RunTable, second: RunTable, error: tuple[np.ndarray, np.ndarray]
) -> Paired | None:
    """Compare runs that share model, samples and seed; None for fewer than two pairs.

    `error` has the errors of both tables.
    """
    from scipy import stats

    both = [_by_the_rest(table, x) for table, x in zip((first, second), error, strict=True)]
    rows = np.array([(*both[0][key], *both[1][key]) for key in both[0] if key in both[1]])
    if len(rows) < 2:
        return None
    log = np.log(rows[:, 2] / rows[:, 0])  # of the ratio of errors
    compute = np.log(rows[:, 3] / rows[:, 1])
    interval = stats.ttest_1samp(log, 0).confidence_interval(LEVEL)
    unequal = int((np.abs(compute) > SURE).sum())
    ends = (float(x) for x in np.exp([log.mean(), *interval, compute.mean()]))
    return Paired(len(rows), *ends, unequal)


def _by_the_rest(table: RunTable, error: np.ndarray) -> dict[tuple[str, ...], tuple[float, float]]:
    """Map (model, samples, seed) to error and compute, without runs that share these."""
    values: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row, error_of_run in zip(table.rows, error.tolist(), strict=True):
        samples = number(row, "samples_seen")
        size = number(row, "gmacs_per_sample")
        length = text(row, "samples_seen_scale") or f"{samples:.2g}"
        flops = number(row, "training_flops") if text(row, "training_flops") else size * samples
        key = row["arch"], length, text(row, "seed")
        values.setdefault(key, []).append((error_of_run, flops))
    return {key: runs[0] for key, runs in values.items() if len(runs) == 1}


# ------------------------------------------------------------------ for a terminal


@dataclass(frozen=True, kw_only=True)
class FamilyPair:
    """Two named families of runs: their laws compared, and their matching runs."""

    families: tuple[str, str]
    comparison: Comparison
    paired: Paired | None

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; null for an open interval."""
        crossings = []
        for crossing in self.comparison.crossings:
            values = crossing._asdict()
            values["low"] = crossing.low or None
            values["high"] = crossing.high if crossing.high < math.inf else None
            crossings.append(values)
        return {
            "families": list(self.families),
            "crossings": crossings,
            "segments": [segment._asdict() for segment in self.comparison.segments],
            "ratios": [ratio._asdict() for ratio in self.comparison.ratios],
            "share_of_draws_that_cross": self.comparison.share,
            "paired": self.paired._asdict() if self.paired else None,
        }


def describe(pair: FamilyPair) -> list[str]:
    """Format a comparison as lines of text."""
    first, second = pair.families
    segments = pair.comparison.segments
    crossings = pair.comparison.crossings
    lines = [f"{second} compared with {first}:"]
    if not segments:
        lines.append("  no compute at which both have runs; what follows is extrapolated")
    for segment in segments:
        better = "not determined which"
        if segment.better is not None:
            better = pair.families[segment.better]
        lines.append(f"  from {segment.low:.3g} to {segment.high:.3g}: {better} is better")
    for ratio in pair.comparison.ratios:
        words = f"{difference(ratio, '+.1%')}, lower in {ratio.share:.0%} of draws"
        lines.append(f"  at {ratio.compute:.3g}: {words}")
    for crossing in crossings:
        low = f"{crossing.low:.3g}" if crossing.low else "unknown"
        high = f"{crossing.high:.3g}" if crossing.high < math.inf else "unknown"
        mark = "" if crossing.inside else "; EXTRAPOLATED, not all have runs around it"
        lines.append(
            f"  the laws cross at {crossing.compute:.3g} (95%: {low} to {high}), above it "
            f"{pair.families[crossing.better]} is better{mark}"
        )
    if segments and not any(crossing.inside for crossing in crossings):
        share = pair.comparison.share
        lines.append(f"  the laws do not cross in this range; in {share:.0%} of draws they do")
    if paired := pair.paired:
        line = f"  in {paired.pairs} pairs of matching runs: {difference(paired, '+.2%')}"
        if paired.unequal:
            times = f"{paired.compute:.2f} times as much on average"
            line += f"; {paired.unequal} differ in compute, {second} has {times}"
        lines.append(line)
    return lines


def difference(at: Ratio | Paired, form: str) -> str:
    """Format a ratio of errors with its interval, as a relative difference."""
    low, high = at.low - 1, at.high - 1
    return f"{at.ratio - 1:{form}} error (95%: {low:{form}} to {high:{form}})"
