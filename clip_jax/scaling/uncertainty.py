"""Fit laws with uncertainty: intervals of parameters, of predictions, and of crossings of laws.

All fits minimise squared relative residuals: the noise of a run is proportional to its error.
- A power law through all runs is a line in log-log, with Student's t intervals, exact for Gaussian
  noise.
- Other laws through all runs use a parametric bootstrap: they are fitted again to errors drawn
  around the fit. The noise level is drawn, too, from its distribution given the residuals; for a
  line, this gives Student's t.
- Laws through a frontier are fitted again to resampled runs.

benchmarks/scaling_coverage.py measures the coverage of these intervals.
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
Sizes = tuple[float, float]  # smallest and largest size for a division of compute

LEVEL = 0.95  # of every interval
TAIL = (1 - LEVEL) / 2
BEYOND = 100.0  # factor beyond the runs' compute, on both sides, of the search for crossings
GRID = 400  # points, evenly spaced in log C, between which crossings are interpolated


class Prediction(NamedTuple):
    """Predicted errors, and the 95% interval of each."""

    error: Numbers
    low: Numbers
    high: Numbers


def middle(draws: np.ndarray) -> tuple[Numbers, Numbers]:
    """Return the central 95% interval of draws along the first axis."""
    low, high = np.quantile(draws, [TAIL, 1 - TAIL], axis=0)
    return low, high


class Fit(NamedTuple):
    """A law fitted to runs or their frontier, with bootstrap draws of it."""

    law: Law
    runs: Runs  # all of them
    fitted: Runs  # points of the fit: the runs, or the bins of their frontier
    drawn: Law  # draws of the law: each parameter is `[draws]`
    noise: float  # relative scatter around the law, as a standard deviation
    freedom: int  # degrees of freedom: fitted points − parameters
    is_line: bool = False  # a power law through all runs, with exact intervals

    def interval(self, parameter: str) -> tuple[float, float]:
        """Return the 95% interval of a parameter of the law."""
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
        """Evaluate the law with its own interval, the band of a plot."""
        return self.predict(size, samples, third, new=False)

    def predict(
        self, size: Numbers, samples: Numbers, third: Numbers | None = None, *, new: bool = True
    ) -> Prediction:
        """Evaluate the law with the interval of one `new` run, which includes its scatter."""
        error = self.law(size, samples, third)
        if self.is_line:  # with `new`, of one more run; otherwise, of the line
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
        """The quantile of Student's t times the noise."""
        from scipy import special

        return self.noise * float(special.stdtrit(self.freedom, 1 - TAIL))

    def draws(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> np.ndarray:
        """Evaluate every draw of the law: `[draws, ...]`."""
        axes = np.broadcast(size, samples, *(() if third is None else (third,))).ndim
        laws = self.drawn.map(lambda x: x.reshape(-1, *(1,) * axes))
        return np.asarray(laws(size, samples, third))

    def divided(self, compute: Float[np.ndarray, " C"], sizes: Sizes) -> tuple[Optimum, Optimum]:
        """Return the best division of compute by the law, `[C]`, and by each draw, `[draws, C]`."""
        drawn = self.drawn.map(lambda x: x[:, None])
        return self.law.optimum(compute, sizes), drawn.optimum(compute, sizes)

    def best(self, compute: Float[np.ndarray, " C"], sizes: Sizes) -> dict[str, Prediction]:
        """Return `size`, `samples` and `error` of the best division, each with its interval."""
        law, drawn = self.divided(compute, sizes)
        return {
            name: Prediction(value, *middle(np.asarray(draws)))
            for name, value, draws in zip(Optimum._fields, law, drawn, strict=True)
        }

    @property
    def irreducible(self) -> float | None:
        """The irreducible error, or None if the runs do not determine it.

        They do if its interval is above zero and narrower than half the estimate. Runs that have
        not begun to level off are compatible with almost any value.
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
    """Fit one law to all runs, or to the lowest error of each bin of compute.

    `draws` and `seed` are those of the bootstrap. Raises InputError for too few points, errors that
    are not positive, or an additive law through a frontier, whose bins have no size and no samples.
    """
    kind = LAWS[form]
    parameters = len(kind.names())
    if not (runs.error > 0).all():
        raise InputError(
            f"errors must be positive, but the lowest is {runs.error.min()}; a score must be a "
            "fraction, since its error is 1 − metric, and an error needs metric_is=error."
        )
    if issubclass(kind, Additive) and through == "frontier":
        raise InputError(f"the {form} law needs sizes and samples; set through=all.")
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
            f"{form} law and its scatter; it needs at least {parameters + 1}."
        )
    law = kind.fitted(fitted, fitted.error[None], np.ones((1, points))).map(lambda x: x[0])
    freedom, rng = points - parameters, np.random.default_rng(seed)
    is_line = through == "all" and isinstance(law, PowerLaw)
    residual = np.log(fitted.error / fitted.under(law))
    noise = float(np.sqrt(np.square(residual).sum() / freedom))
    if through == "frontier":
        drawn = _resampled(kind, runs, edges, rng, draws)
    else:
        # Draws of the standard deviation, given that of the residuals.
        scatter = noise * np.sqrt(freedom / rng.chisquare(freedom, draws))
        if isinstance(law, PowerLaw):
            drawn = _lines(law, runs, scatter, rng)
        else:
            normal = rng.standard_normal((draws, points))
            error = runs.under(law) * np.exp(scatter[:, None] * normal)
            drawn = kind.fitted(runs, error, np.ones_like(error))
    return Fit(law, runs, fitted, drawn, noise, freedom, is_line)


def _mean_and_spread(runs: Runs) -> tuple[float, float]:
    """Return the mean of log C, and the sum of squares around it."""
    x = np.log(runs.compute)
    return float(x.mean()), float(np.square(x - x.mean()).sum())


def _lines(
    law: PowerLaw, runs: Runs, scatter: Float[np.ndarray, " draws"], rng: np.random.Generator
) -> PowerLaw:
    """Draw lines that are compatible with the runs.

    With three runs, one in thousands is too steep for a float; these are left out.
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
    bins = Runs(compute, np.ones_like(compute), compute)  # the errors differ between draws
    drawn = kind.fitted(bins, np.where(full, error, 1.0), full.astype(float))
    held = np.isfinite([*drawn.parameters.values()]).all(axis=0)  # a draw may have a single bin
    return drawn.map(lambda x: x[held])


# ------------------------------------------------------------------ two fits


def sizes_of(fits: Sequence[Fit]) -> Sizes:
    """Return the sizes allowed for the best division of compute: up to 10 times beyond the runs."""
    sizes = np.concatenate([fit.runs.size for fit in fits])
    return float(sizes.min() / 10), float(sizes.max() * 10)


def _errors(
    first: Fit, second: Fit, compute: Float[np.ndarray, " C"]
) -> tuple[Float[np.ndarray, "R C"], Float[np.ndarray, "R C"]]:
    """Evaluate two laws at their best divisions of compute: the estimates, then every draw."""
    sizes = sizes_of([first, second])
    both = [
        np.concatenate([np.atleast_2d(x.error) for x in fit.divided(compute, sizes)])
        for fit in (first, second)
    ]
    n = min(map(len, both))
    return both[0][:n], both[1][:n]


class Crossing(NamedTuple):
    """The compute from which the family that is better at large compute is better."""

    better: int  # index of that family, 0 or 1
    compute: float | None  # None: it is better in the complete range searched
    low: float  # lower end of the 95% interval; 0: below the range searched
    high: float  # upper end; inf: above the range searched
    share: float  # share of draws that cross this way in the range searched


def crossing(first: Fit, second: Fit) -> Crossing:
    """Find the compute from which one family's error stays below the other's.

    The range searched is 1/100 of the runs' smallest compute to 100 times their largest. Draws in
    which the error is below throughout count as crossing before the range, those in which it is
    above as crossing after it, and those that cross the other way as both.
    """
    computes = np.concatenate([first.runs.compute, second.runs.compute])
    log = np.linspace(np.log(computes.min() / BEYOND), np.log(computes.max() * BEYOND), GRID)
    one, other = _errors(first, second, np.exp(log))
    gap = np.log(one / other)  # [draws, C], above 0 where the second is better
    better = int(gap[0, -1] > 0)
    gap = gap if better else -gap
    begins, ends = gap[:, 0] > 0, gap[:, -1] > 0
    crosses = ~begins & ends
    # The first point from which all are above 0.
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
    share: float  # share of draws in which the second's error is lower


def ratios(first: Fit, second: Fit, compute: Float[np.ndarray, " C"]) -> list[Ratio]:
    """Compare two laws at some amounts of compute, each at its own best division."""
    one, other = _errors(first, second, compute)
    ratio = other / one
    rows = np.stack([compute, ratio[0], *middle(ratio[1:]), (ratio[1:] < 1).mean(0)])
    return [Ratio(*row) for row in rows.T.tolist()]


class Paired(NamedTuple):
    """The second family's errors as multiples of the first's, in otherwise equal runs.

    The mean is geometric, with Student's t interval.
    """

    pairs: int
    ratio: float
    low: float
    high: float


def paired(pairs: Float[np.ndarray, "n 2"]) -> Paired | None:
    """Compare errors pair by pair; None for fewer than two pairs."""
    from scipy import stats

    if len(pairs) < 2:
        return None
    log = np.log(pairs[:, 1] / pairs[:, 0])
    interval = stats.ttest_1samp(log, 0).confidence_interval(LEVEL)
    return Paired(len(pairs), *map(float, np.exp([log.mean(), *interval])))
