"""Fit scaling laws to runs, with the uncertainty of what is fitted.

All fits minimise squared relative residuals: a run's noise is a share of its error. The straight
line through all runs is least squares in log-log with Student's t intervals, exact for Gaussian
noise. Everything else has percentile bootstrap intervals over the runs, which promise less: on
known laws they held the frontier's α in 95% of 200 tables, and the irreducible error in 90%
(tests/scaling/test_coverage.py).
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from clip_jax.scaling.laws import (
    BINS,
    Additive,
    Law,
    Numbers,
    PowerLaw,
    Runs,
    Saturating,
    bin_edges,
    frontier,
    pareto,
)
from clip_jax.scaling.projection import search

Form = Literal["power", "saturating", "additive"]
Through = Literal["frontier", "all"]

LAWS: dict[str, type[Law]] = {"power": PowerLaw, "saturating": Saturating, "additive": Additive}
LEVEL = 0.95  # of every interval
EXPONENTS = np.geomspace(0.01, 3.0, 24)  # where the search for an exponent starts
SAME = 1e-3  # an offset this small beside the least compute is none


class Prediction(NamedTuple):
    """Errors of runs, and the interval in which each should fall."""

    error: Numbers
    low: Numbers
    high: Numbers


# ------------------------------------------------------------------ the straight line


class Line(NamedTuple):
    """Least squares of y on x, over the last axis, and what Student's t needs."""

    slope: Numbers
    intercept: Numbers
    noise: Numbers  # standard deviation of the residuals, n − 2 degrees of freedom
    reach: float  # t's quantile
    n: int
    x_mean: float
    x_spread: float  # Σ (x − x_mean)²

    def slope_interval(self) -> tuple[Numbers, Numbers]:
        half = self.reach * self.noise / np.sqrt(self.x_spread)
        return self.slope - half, self.slope + half

    def at(self, x: Numbers, new: bool) -> Prediction:
        """The line at x; `new`: of one new measurement, otherwise of the line's own height."""
        variance = 1 / self.n + (x - self.x_mean) ** 2 / self.x_spread + new
        half = self.reach * self.noise * np.sqrt(variance)
        y = self.intercept + self.slope * x
        return Prediction(y, y - half, y + half)


def fit_line(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "*R n"]) -> Line:
    """Fit straight lines: one x, and any number of y for it."""
    from scipy import special

    n = len(x)
    x_mean = x.mean()
    x_spread = np.square(x - x_mean).sum()
    slope = ((x - x_mean) * y).sum(-1) / x_spread
    intercept = y.mean(-1) - slope * x_mean
    residual = y - slope[..., None] * x - intercept[..., None]
    noise = np.sqrt(np.square(residual).sum(-1) / (n - 2))
    reach = float(special.stdtrit(n - 2, (1 + LEVEL) / 2))
    return Line(slope, intercept, noise, reach, n, float(x_mean), float(x_spread))


class LineFit(NamedTuple):
    """E = β·C^α through all runs, with exact intervals."""

    law: PowerLaw
    fitted: Runs  # what the law went through
    line: Line

    def interval(self, parameter: str) -> tuple[float, float]:
        """95% interval of a parameter of the law."""
        if parameter == "alpha":
            low, high = self.line.slope_interval()
            return float(low), float(high)
        at_one = self.line.at(0.0, new=False)
        return float(np.exp(at_one.low)), float(np.exp(at_one.high))

    def curve(self, size: Numbers, samples: Numbers) -> Prediction:
        """Evaluate the law, with the interval of the law itself: the band of a plot."""
        return self._at(size, samples, new=False)

    def predict(self, size: Numbers, samples: Numbers) -> Prediction:
        """Evaluate the law, with the interval for one new run: the band and a run's scatter."""
        return self._at(size, samples, new=True)

    def _at(self, size: Numbers, samples: Numbers, new: bool) -> Prediction:
        return Prediction(*map(np.exp, self.line.at(np.log(size * samples), new)))


# ------------------------------------------------------------------ the bootstrap


class BootstrapFit(NamedTuple):
    """A law through runs or their frontier, and the same law through resampled runs."""

    law: Law
    fitted: Runs  # what the law went through: the runs, or the bins of their frontier
    draws: Law  # each parameter `[draws]`
    noise: float  # relative scatter around the law, for the degrees of freedom that are left
    freedom: int  # fitted points − parameters

    def interval(self, parameter: str) -> tuple[float, float]:
        """95% interval of a parameter of the law."""
        low, high = _middle(getattr(self.draws, parameter))
        return float(low), float(high)

    def curve(self, size: Numbers, samples: Numbers) -> Prediction:
        """Evaluate the law, with the interval of the law itself: the band of a plot."""
        return Prediction(self.law(size, samples), *_middle(self.curves(size, samples)))

    def predict(self, size: Numbers, samples: Numbers) -> Prediction:
        """Evaluate the law, with the interval for one new run: the band and a run's scatter."""
        curves = self.curves(size, samples)
        # One fixed seed: the same table gives the same interval.
        t = np.random.default_rng(0).standard_t(self.freedom, len(curves))
        scatter = np.exp(self.noise * t).reshape(-1, *(1,) * (curves.ndim - 1))
        return Prediction(self.law(size, samples), *_middle(curves * scatter))

    def curves(self, size: Numbers, samples: Numbers) -> np.ndarray:
        """Evaluate every draw: `[draws, ...]`."""
        size, samples = np.broadcast_arrays(np.asarray(size, float), np.asarray(samples, float))
        shape = (-1, *(1,) * size.ndim)
        draws = type(self.draws)(*(np.reshape(p, shape) for p in self.draws))
        return np.asarray(draws(size, samples))


Fit = LineFit | BootstrapFit


def _middle(draws: np.ndarray) -> tuple[Numbers, Numbers]:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], axis=0)
    return low, high


def fit(
    form: Form,
    runs: Runs,
    through: Through = "frontier",
    *,
    bins: int = BINS,
    draws: int = 1_000,
    seed: int = 0,
) -> Fit:
    """Fit one law to runs.

    Args:
      form: `power` β·C^α; `saturating` E∞ + A·(C + B)^−α; `additive` E∞ + A·N^−a + B·D^−b.
      runs: the measured runs.
      through: all runs, or the least error of each bin of compute.
      bins: of the frontier.
      draws: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      ValueError: too few points for the law's parameters, errors that are not positive, or an
        additive law through a frontier, whose bins have no size and no samples.
    """
    law, wanted = LAWS[form], len(LAWS[form]._fields) + 1
    if not (runs.error > 0).all():
        raise ValueError(
            f"errors must be positive to have a logarithm; the least is {runs.error.min()}. For a "
            "metric that is better when larger, the error is 1 − metric, as a fraction."
        )
    if form == "additive" and through == "frontier":
        raise ValueError("an additive law needs sizes and samples: fit it through all runs.")
    edges = bin_edges(runs.compute, bins) if through == "frontier" else None
    fitted = runs if edges is None else _at_bins(runs, edges)
    if len(fitted.error) < wanted:
        raise ValueError(
            f"{len(fitted.error)} points ({through}) cannot determine the {wanted - 1} parameters "
            f"of the {form} law and their scatter: it takes {wanted} or more."
        )
    if form == "power" and edges is None:
        line = fit_line(np.log(runs.compute), np.log(runs.error))
        return LineFit(PowerLaw(line.slope, np.exp(line.intercept)), runs, line)

    once = np.ones((1, len(runs.error)))
    point = law(*np.stack(_estimate(law, runs, once, edges))[:, 0])
    counts = np.random.default_rng(seed).multinomial(
        len(runs.error), np.full(len(runs.error), 1 / len(runs.error)), draws
    )
    resampled = np.stack(_estimate(law, runs, counts.astype(float), edges))
    usable = np.isfinite(resampled).all(axis=0)  # a draw may hold one bin alone
    residual = np.log(fitted.error / point(fitted.size, fitted.samples))
    freedom = len(fitted.error) - len(law._fields)
    return BootstrapFit(
        law=point,
        fitted=fitted,
        draws=law(*resampled[:, usable]),
        noise=float(np.sqrt(np.square(residual).sum() / freedom)),
        freedom=freedom,
    )


def _at_bins(runs: Runs, edges: Float[np.ndarray, "edges"]) -> Runs:
    compute, error = frontier(runs.compute, runs.error, edges)
    full = np.isfinite(error)
    return Runs(compute[full], np.ones(full.sum()), error[full])


def _estimate(
    law: type[Law],
    runs: Runs,
    counts: Float[np.ndarray, "R n"],
    edges: Float[np.ndarray, "edges"] | None,
) -> Law:
    """Fit a law to runs that each count `counts` times; every parameter is `[R]`."""
    size, samples, error, weights = runs.size, runs.samples, runs.error[None], counts
    if edges is not None:
        size, error = frontier(runs.compute, np.where(counts > 0, runs.error, np.inf), edges)
        weights = np.isfinite(error).astype(float)
        samples, error = np.ones_like(size), np.where(weights > 0, error, 1.0)
    if law is PowerLaw:
        return _power(size * samples, error, weights)
    if law is Saturating:
        return _saturating(size * samples, error, weights)
    return _additive(size, samples, error, weights)


def _power(compute: np.ndarray, error: np.ndarray, weights: np.ndarray) -> PowerLaw:
    x, y, total = np.log(compute), np.log(error), weights.sum(-1)
    x_mean, y_mean = (weights * x).sum(-1) / total, (weights * y).sum(-1) / total
    dx, dy = x - x_mean[:, None], y - y_mean[:, None]
    with np.errstate(invalid="ignore"):  # one bin alone has no slope: NaN
        slope = (weights * dx * dy).sum(-1) / (weights * dx * dx).sum(-1)
    return PowerLaw(slope, np.exp(y_mean - slope * x_mean))


def _saturating(compute: np.ndarray, error: np.ndarray, weights: np.ndarray) -> Saturating:
    unit = np.exp(np.log(compute).mean())  # powers of numbers near 1 keep their digits
    c = compute / unit

    def features(alpha: np.ndarray, offset: np.ndarray) -> np.ndarray:
        power = (c + offset[..., None]) ** -alpha[..., None]
        return np.stack([power, np.ones_like(power)], axis=-1)

    offsets = np.geomspace(SAME * c.min(), c.max(), 16)
    (alpha, offset), (scale, irreducible) = search(features, (EXPONENTS, offsets), error, weights)
    return Saturating(alpha, offset * unit, scale * unit**alpha, irreducible)


def _additive(
    size: np.ndarray, samples: np.ndarray, error: np.ndarray, weights: np.ndarray
) -> Additive:
    size_unit, samples_unit = np.exp(np.log(size).mean()), np.exp(np.log(samples).mean())
    n, d = size / size_unit, samples / samples_unit

    def features(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        powers = [n ** -a[..., None], d ** -b[..., None]]
        return np.stack([*powers, np.ones_like(powers[0])], axis=-1)

    (a, b), (size_scale, samples_scale, irreducible) = search(
        features, (EXPONENTS, EXPONENTS), error, weights
    )
    return Additive(a, b, size_scale * size_unit**a, samples_scale * samples_unit**b, irreducible)


# ------------------------------------------------------------------ what a fit is asked


def irreducible(fit: Fit) -> float | None:
    """The irreducible error, or None where the runs do not determine it.

    It is stated only if its interval stays clear of zero and is narrower than half the estimate:
    runs that have not begun to level off fit almost any value.
    """
    if isinstance(fit.law, PowerLaw):
        return None
    low, high = fit.interval("irreducible")
    value = float(fit.law.irreducible)
    return value if low > 0 and high - low < 0.5 * value else None


class HoldOut(NamedTuple):
    """Runs that took no part in a fit, and what the fit says about them."""

    runs: Runs
    predicted: Prediction
    within: Bool[np.ndarray, "n"]  # whether the measured error fell into the interval
    relative_error: Float[np.ndarray, "n"]  # predicted / measured − 1


def hold_out(
    form: Form,
    runs: Runs,
    held: Bool[np.ndarray, "n"],
    through: Through = "frontier",
    *,
    bins: int = BINS,
    draws: int = 1_000,
    seed: int = 0,
) -> HoldOut:
    """Fit the runs that are not `held` and predict those that are: usually the largest.

    A fit through the frontier speaks of the best runs alone, so of the held-out ones those are
    predicted that no other run beats with as little compute. Raises ValueError if none is left.
    """
    tested = held & pareto(runs) if through == "frontier" else held
    if not tested.any():
        raise ValueError(
            f"nothing to predict: of {len(held)} runs {held.sum()} are held out, and none of these "
            f"is tested; their compute reaches {runs.compute.max():g}."
        )
    rest = fit(form, runs.where(~held), through, bins=bins, draws=draws, seed=seed)
    test = runs.where(tested)
    predicted = rest.predict(test.size, test.samples)
    return HoldOut(
        runs=test,
        predicted=predicted,
        within=(predicted.low <= test.error) & (test.error <= predicted.high),
        relative_error=predicted.error / test.error - 1,
    )


class Choice(NamedTuple):
    """Which of some model sizes a budget of compute serves best."""

    best: int  # index of the size
    samples: float
    predicted: Prediction  # of every size, at the budget
    share: Float[np.ndarray, "sizes"]  # of the bootstrap draws that choose each size


def allocate(fit: BootstrapFit, compute: float, sizes: Float[np.ndarray, "sizes"]) -> Choice:
    """Choose the size with the least predicted error when all of `compute` is spent.

    The fit must be additive: only that law tells sizes of equal compute apart.
    """
    samples = compute / sizes
    predicted = fit.predict(sizes, samples)
    best = int(np.argmin(predicted.error))
    choices = fit.curves(sizes, samples).argmin(axis=1)
    share = np.bincount(choices, minlength=len(sizes)) / len(choices)
    return Choice(best, float(samples[best]), predicted, share)
