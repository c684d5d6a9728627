"""Fits with their uncertainty: intervals of laws, of predictions, and of where laws cross.

All fits minimise squared relative residuals: a run's noise is a share of its error. The straight
line through all runs is least squares in log-log with Student's t intervals, exact for Gaussian
noise. Other laws through all runs are fitted again to errors drawn around them, whose scatter is
itself drawn from what the residuals say of it (a parametric bootstrap, which for a straight line
gives Student's t). Laws through a frontier are fitted again to resampled runs. What these intervals
cover is measured in benchmarks/scaling_coverage.py.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from clip_jax.errors import InputError
from clip_jax.scaling.laws import (
    BINS,
    LAWS,
    Additive,
    Batched,
    Law,
    Numbers,
    Optimum,
    PowerLaw,
    Repeated,
    Runs,
    bin_edges,
    frontier,
)

Form = Literal["power", "saturating", "additive", "repeated", "batched"]
Through = Literal["frontier", "all"]
Sizes = tuple[float, float]  # the least and the largest that a division of compute may choose

LEVEL = 0.95  # of every interval
TAIL = (1 - LEVEL) / 2
BEYOND = 100.0  # times less and more compute than any run's, within which crossings are looked for
GRID = 400  # amounts of compute evenly spread in log C, between which a crossing is interpolated


class Prediction(NamedTuple):
    """Errors of runs, and the interval in which each should fall."""

    error: Numbers
    low: Numbers
    high: Numbers


def middle(draws: np.ndarray) -> tuple[Numbers, Numbers]:
    """Return the 95% in the middle of draws, along the first axis."""
    low, high = np.quantile(draws, [TAIL, 1 - TAIL], axis=0)
    return low, high


class Fit(NamedTuple):
    """A law through runs or their frontier, and what else the runs may mean."""

    law: Law
    runs: Runs  # all of them
    fitted: Runs  # what the law went through: the runs, or the bins of their frontier
    drawn: Law  # each parameter `[draws]`
    noise: float  # relative scatter around the law, for the degrees of freedom that are left
    freedom: int  # fitted points − parameters
    is_line: bool = False  # through all runs: then intervals are Student's t, and exact

    def interval(self, parameter: str) -> tuple[float, float]:
        """95% interval of a parameter of the law."""
        if not self.is_line:
            low, high = middle(getattr(self.drawn, parameter))
        elif parameter == "alpha":
            alpha, (_, spread) = self.law.parameters["alpha"], _mean_and_spread(self.runs)
            half = self._reach / np.sqrt(spread)
            low, high = alpha - half, alpha + half
        else:  # beta is the law at one unit of compute
            _, low, high = self.curve(1.0, 1.0)
        return float(low), float(high)

    def curve(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Prediction:
        """Evaluate the law, with the interval of the law itself: the band of a plot."""
        return self.predict(size, samples, third, new=False)

    def predict(
        self, size: Numbers, samples: Numbers, third: Numbers | None = None, *, new: bool = True
    ) -> Prediction:
        """Evaluate the law, with the interval for one `new` run: the band and a run's scatter."""
        error = self.law(size, samples, third)
        if self.is_line:  # `new` is of one more run, otherwise of the line's height
            mean, spread = _mean_and_spread(self.runs)
            away = (np.log(size * samples) - mean) ** 2 / spread
            factor = np.exp(self._reach * np.sqrt(1 / len(self.runs.error) + away + new))
            return Prediction(error, error / factor, error * factor)
        curves = self.draws(size, samples, third)
        if new:  # one fixed seed: the same table gives the same interval
            t = np.random.default_rng(0).standard_t(self.freedom, len(curves))
            curves = curves * np.exp(self.noise * t).reshape(-1, *(1,) * (curves.ndim - 1))
        return Prediction(error, *middle(curves))

    @property
    def _reach(self) -> float:
        """Student's t's quantile, in units of an error with a variance of 1."""
        from scipy import special

        return self.noise * float(special.stdtrit(self.freedom, 1 - TAIL))

    def draws(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> np.ndarray:
        """Evaluate every draw of the law: `[draws, ...]`."""
        axes = np.broadcast(size, samples, *(() if third is None else (third,))).ndim
        laws = self.drawn.map(lambda x: x.reshape(-1, *(1,) * axes))
        return np.asarray(laws(size, samples, third))

    def divided(self, compute: Float[np.ndarray, " C"], sizes: Sizes) -> tuple[Optimum, Optimum]:
        """Divide compute best: by the law `[C]`, and by every draw `[draws, C]`."""
        drawn = self.drawn.map(lambda x: x[:, None])
        return self.law.optimum(compute, sizes), drawn.optimum(compute, sizes)

    def best(self, compute: Float[np.ndarray, " C"], sizes: Sizes) -> dict[str, Prediction]:
        """Divide compute best: `size`, `samples` and `error`, each with its interval."""
        law, drawn = self.divided(compute, sizes)
        return {
            name: Prediction(value, *middle(np.asarray(draws)))
            for name, value, draws in zip(Optimum._fields, law, drawn, strict=True)
        }

    @property
    def irreducible(self) -> float | None:
        """The irreducible error, or None where the runs do not determine it.

        It is stated only if its interval stays clear of zero and is narrower than half the
        estimate: runs that have not begun to level off fit almost any value.
        """
        if "irreducible" not in self.law.names():
            return None
        low, high = self.interval("irreducible")
        value = float(self.law.parameters["irreducible"])
        return value if low > 0 and high - low < 0.5 * value else None


def fit_law(
    form: Form,
    runs: Runs,
    through: Through = "frontier",
    *,
    bins: int = BINS,
    draws: int = 1_000,
    seed: int = 0,
) -> Fit:
    """Fit one law to runs: to all of them, or to the least error of each bin of compute.

    The bootstrap has `draws` and a `seed`.

    Raises InputError for too few points for the law's parameters, errors that are not positive, or
    an additive law through a frontier, whose bins have no size and no samples.
    """
    kind = LAWS[form]
    parameters = len(kind.names())
    if not (runs.error > 0).all():
        raise InputError(
            f"errors must be positive to have a logarithm; the least is {runs.error.min()}. For a "
            "metric that is better when larger, the error is 1 − metric, as a fraction."
        )
    if issubclass(kind, Additive) and through == "frontier":
        raise InputError(f"the {form} law needs sizes and samples: fit it through all runs.")
    if kind in (Repeated, Batched) and (runs.third is None or not (runs.third > 0).all()):
        what = "distinct samples" if kind is Repeated else "batch"
        raise InputError(f"the {form} law needs the {what} of each run, more than 0.")
    fitted, edges = runs, bin_edges(runs.compute, bins)
    if through == "frontier":
        compute, error = frontier(runs.compute, runs.error, edges)
        full = np.isfinite(error)
        fitted = Runs(compute[full], np.ones(full.sum()), error[full])
    points = len(fitted.error)
    if points <= parameters:
        raise InputError(
            f"{points} points ({through}) cannot determine the {parameters} parameters of the "
            f"{form} law and their scatter: it takes {parameters + 1} or more."
        )
    law = kind.fitted(fitted, fitted.error[None], np.ones((1, points))).map(lambda x: x[0])
    freedom, rng = points - parameters, np.random.default_rng(seed)
    is_line = through == "all" and isinstance(law, PowerLaw)
    residual = np.log(fitted.error / fitted.under(law))
    noise = float(np.sqrt(np.square(residual).sum() / freedom))
    if through == "frontier":
        drawn = _resampled(kind, runs, edges, rng, draws)
    else:
        # What the standard deviation may be, given the residuals' own.
        scatter = noise * np.sqrt(freedom / rng.chisquare(freedom, draws))
        if isinstance(law, PowerLaw):
            drawn = _lines(law, runs, scatter, rng)
        else:
            normal = rng.standard_normal((draws, points))
            error = runs.under(law) * np.exp(scatter[:, None] * normal)
            drawn = kind.fitted(runs, error, np.ones_like(error))
    return Fit(law, runs, fitted, drawn, noise, freedom, is_line)


def _mean_and_spread(runs: Runs) -> tuple[float, float]:
    """Return the mean of the logarithms of compute, and the sum of squares around it."""
    x = np.log(runs.compute)
    return float(x.mean()), float(np.square(x - x.mean()).sum())


def _lines(
    law: PowerLaw, runs: Runs, scatter: Float[np.ndarray, " draws"], rng: np.random.Generator
) -> PowerLaw:
    """Draw lines that the runs may mean as well.

    With a run more than a line has parameters, one in thousands is steeper than any float.
    """
    mean, spread = _mean_and_spread(runs)
    slope = law.alpha + scatter / np.sqrt(spread) * rng.standard_normal(len(scatter))
    height = np.log(law.beta) + law.alpha * mean
    height = height + scatter / np.sqrt(len(runs.error)) * rng.standard_normal(len(scatter))
    with np.errstate(over="ignore"):
        beta = np.exp(height - slope * mean)
    held = np.isfinite(beta) & (beta > 0)
    return PowerLaw(slope[held], beta[held])


def _resampled(
    kind: type[Law], runs: Runs, edges: np.ndarray, rng: np.random.Generator, draws: int
) -> Law:
    """Fit the frontiers of runs drawn with replacement; every parameter is `[draws]`."""
    n = len(runs.error)
    counts = rng.multinomial(n, np.full(n, 1 / n), draws)
    compute, error = frontier(runs.compute, np.where(counts > 0, runs.error, np.inf), edges)
    full = np.isfinite(error)
    bins = Runs(compute, np.ones_like(compute), compute)  # whose errors are each draw's own
    drawn = kind.fitted(bins, np.where(full, error, 1.0), full.astype(float))
    held = np.isfinite([*drawn.parameters.values()]).all(axis=0)  # a draw may hold one bin alone
    return drawn.map(lambda x: x[held])


# ------------------------------------------------------------------ two fits


def sizes_of(fits: Sequence[Fit]) -> Sizes:
    """Say which sizes the best division of compute may choose: somewhat beyond those measured."""
    sizes = np.concatenate([fit.runs.size for fit in fits])
    return float(sizes.min() / 10), float(sizes.max() * 10)


def _errors(
    first: Fit, second: Fit, compute: Float[np.ndarray, " C"]
) -> tuple[Float[np.ndarray, "R C"], Float[np.ndarray, "R C"]]:
    """Evaluate two laws where each divides compute best: the estimates, then every draw."""
    sizes = sizes_of([first, second])
    both = [
        np.concatenate([np.atleast_2d(x.error) for x in fit.divided(compute, sizes)])
        for fit in (first, second)
    ]
    n = min(map(len, both))
    return both[0][:n], both[1][:n]


class Crossing(NamedTuple):
    """Where the family that is better in the end becomes so."""

    better: int  # that family: 0 the first, 1 the second
    compute: float | None  # None: it is better from the least compute on that was looked at
    low: float  # of the 95% interval; 0: before what was looked at
    high: float  # inf: beyond what was looked at
    share: float  # of the draws that cross so within what was looked at: how sure it is


def crossing(first: Fit, second: Fit) -> Crossing:
    """Find where one family's error falls below the other's for good.

    That is looked for from 1/100 of the runs' least compute to 100 times their largest. Draws in
    which it is below from the beginning count as crossing before, those in which it never is as
    crossing beyond, and those that cross the other way as both.
    """
    computes = np.concatenate([first.runs.compute, second.runs.compute])
    log = np.linspace(np.log(computes.min() / BEYOND), np.log(computes.max() * BEYOND), GRID)
    one, other = _errors(first, second, np.exp(log))
    gap = np.log(one / other)  # [draws, C], above 0 where the second is better
    better = int(gap[0, -1] > 0)
    gap = gap if better else -gap
    begins, ends = gap[:, 0] > 0, gap[:, -1] > 0
    crosses = ~begins & ends
    # The first of those that are above 0 to the end.
    after = np.where(crosses, GRID - np.argmin(gap[:, ::-1] > 0, axis=1), 1)
    every = np.arange(len(gap))
    below, above = gap[every, after - 1], gap[every, after]
    share = np.where(crosses, below / np.where(crosses, below - above, 1), 0)
    at = np.exp(log[after - 1] + share * (log[1] - log[0]))
    low = np.where(crosses, at, np.where(begins, 0.0, np.inf))
    high = np.where(crosses, at, np.where(ends, 0.0, np.inf))
    return Crossing(
        better=better,
        compute=float(at[0]) if crosses[0] else None,
        low=float(np.quantile(low[1:], TAIL, method="lower")),
        high=float(np.quantile(high[1:], 1 - TAIL, method="higher")),
        share=float(crosses[1:].mean()),
    )


class Ratio(NamedTuple):
    """The second family's error as a multiple of the first's, at equal compute."""

    compute: float
    ratio: float
    low: float
    high: float
    share: float  # of the draws in which the second's is the smaller


def ratios(first: Fit, second: Fit, compute: Float[np.ndarray, " C"]) -> list[Ratio]:
    """Compare two laws at some amounts of compute, each divided as it would have it."""
    one, other = _errors(first, second, compute)
    ratio = other / one
    rows = np.stack([compute, ratio[0], *middle(ratio[1:]), (ratio[1:] < 1).mean(0)])
    return [Ratio(*row) for row in rows.T.tolist()]


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
    from scipy import stats

    if len(pairs) < 2:
        return None
    log = np.log(pairs[:, 1] / pairs[:, 0])
    interval = stats.ttest_1samp(log, 0).confidence_interval(LEVEL)
    return Paired(len(pairs), *map(float, np.exp([log.mean(), *interval])))
