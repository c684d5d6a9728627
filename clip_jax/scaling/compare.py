"""Families of runs side by side: which has the smaller error where, and where their laws cross."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from clip_jax.scaling.fit import LEVEL, Fit, columns, middle
from clip_jax.scaling.laws import Numbers, Runs, optimum

BEYOND = 100.0  # times less and more compute than any run's, within which crossings are looked for
PLACES = 400  # evenly spread in log C, between which a crossing is interpolated

Sizes = tuple[float, float]


class Family(NamedTuple):
    """Runs of one kind, and the law through them."""

    runs: Runs
    fit: Fit

    def errors(self, compute: Float[np.ndarray, " C"], sizes: Sizes) -> Float[np.ndarray, "R C"]:
        """Evaluate the law where each compute is divided best; the estimate, then every draw."""
        law = optimum(self.fit.law, compute, sizes).error
        drawn = optimum(columns(self.fit.drawn), compute, sizes).error
        return np.concatenate([np.asarray(law)[None], np.asarray(drawn)])


class Crossing(NamedTuple):
    """Where the family that is better in the end becomes so."""

    better: int  # that family: 0 the first, 1 the second
    compute: float | None  # None: it is better from the least compute on that was looked at
    low: float  # of the 95% interval; 0: before what was looked at
    high: float  # inf: beyond what was looked at
    share: float  # of the draws that cross so within what was looked at: how sure it is


def sizes_of(families: Sequence[Family]) -> Sizes:
    """Say which sizes the best division of compute may choose: somewhat beyond those measured."""
    sizes = np.concatenate([family.runs.size for family in families])
    return float(sizes.min() / 10), float(sizes.max() * 10)


def crossing(first: Family, second: Family) -> Crossing:
    """Find where one family's error falls below the other's for good.

    That is looked for from 1/100 of the runs' least compute to 100 times their largest. Draws in
    which it is below from the beginning count as crossing before, those in which it never is as
    crossing beyond, and those that cross the other way as both.
    """
    both = np.concatenate([first.runs.compute, second.runs.compute])
    log = np.linspace(np.log(both.min() / BEYOND), np.log(both.max() * BEYOND), PLACES)
    sizes = sizes_of([first, second])
    one, other = (family.errors(np.exp(log), sizes) for family in (first, second))
    n = min(len(one), len(other))
    gap = np.log(one[:n] / other[:n])  # [draws, C], above 0 where the second is better
    better = int(gap[0, -1] > 0)
    gap = gap if better else -gap
    begins, ends = gap[:, 0] > 0, gap[:, -1] > 0
    crosses = ~begins & ends
    # The first place of those that are above 0 to the end.
    after = np.where(crosses, PLACES - np.argmin(gap[:, ::-1] > 0, axis=1), 1)
    every = np.arange(n)
    below, above = gap[every, after - 1], gap[every, after]
    part = np.where(crosses, below / np.where(crosses, below - above, 1), 0)
    at = np.exp(log[after - 1] + part * (log[1] - log[0]))
    low = np.where(crosses, at, np.where(begins, 0.0, np.inf))
    high = np.where(crosses, at, np.where(ends, 0.0, np.inf))
    tail = (1 - LEVEL) / 2
    return Crossing(
        better=better,
        compute=float(at[0]) if crosses[0] else None,
        low=float(np.quantile(low[1:], tail, method="lower")),
        high=float(np.quantile(high[1:], 1 - tail, method="higher")),
        share=float(crosses[1:].mean()),
    )


class Ratio(NamedTuple):
    """The second family's error as a multiple of the first's, at equal compute."""

    compute: float
    ratio: float
    low: float
    high: float
    share: float  # of the draws in which the second's is the smaller


def ratios(first: Family, second: Family, compute: Float[np.ndarray, " C"]) -> list[Ratio]:
    """Compare two laws at some amounts of compute, each divided as it would have it."""
    sizes = sizes_of([first, second])
    one, other = (family.errors(compute, sizes) for family in (first, second))
    n = min(len(one), len(other))
    ratio = other[:n] / one[:n]
    low, high = middle(ratio[1:])
    table = np.stack([compute, ratio[0], low, high, (ratio[1:] < 1).mean(0)])
    return [Ratio(*row) for row in table.T.tolist()]


class Paired(NamedTuple):
    """The second family's errors as multiples of the first's, in runs that differ in nothing else.

    The mean is of logarithms, its interval Student's t.
    """

    pairs: int
    ratio: float
    low: float
    high: float


def paired(pairs: Float[np.ndarray, "n 2"]) -> Paired | None:
    """Compare errors pair by pair; None with fewer than two."""
    from scipy import special

    n = len(pairs)
    if n < 2:
        return None
    log = np.log(pairs[:, 1] / pairs[:, 0])
    half = special.stdtrit(n - 1, (1 + LEVEL) / 2) * log.std(ddof=1) / np.sqrt(n)
    return Paired(n, *map(float, np.exp([log.mean(), log.mean() - half, log.mean() + half])))


def side_by_side(
    families: Mapping[str, Family], alike: Mapping[str, Mapping[Any, float]]
) -> list[dict[str, Any]]:
    """Compare every two families.

    `alike` has each family's errors by what else there is to say of a run: those with the same key
    make a pair.
    """
    found = []
    for one, other in combinations(families, 2):
        first, second = families[one], families[other]
        least = max(x.runs.compute.min() for x in (first, second))  # that both have
        most = min(x.runs.compute.max() for x in (first, second))
        cross = crossing(first, second)
        keys = [key for key in alike[one] if key in alike[other]]
        pairs = np.array([[alike[x][key] for x in (one, other)] for key in keys])
        measured = paired(pairs.reshape(-1, 2))
        found.append(
            {
                "families": [one, other],
                "crossing": {**cross._asdict(), "high": _finite(cross.high)},
                "ratios": [x._asdict() for x in ratios(first, second, np.array([least, most]))],
                "paired": measured and measured._asdict(),
            }
        )
    return found


def _finite(x: Numbers) -> float | None:
    """JSON has no infinity."""
    return float(x) if np.isfinite(x) else None
