"""Fit scaling laws to runs, with the uncertainty of what is fitted.

All fits minimise squared relative residuals: a run's noise is a share of its error. The straight
line through all runs is least squares in log-log with Student's t intervals, exact for Gaussian
noise. Other laws through all runs are fitted again to errors drawn around them, whose scatter is
itself drawn from what the residuals say of it (a parametric bootstrap, which for a straight line
gives Student's t). Laws through a frontier are fitted again to resampled runs. What these intervals
cover is measured in benchmarks/scaling_coverage.py.
"""

from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from clip_jax.errors import InputError
from clip_jax.scaling.estimates import estimate
from clip_jax.scaling.laws import (
    BINS,
    OF_SIZE,
    Additive,
    Batched,
    Law,
    Numbers,
    Optimum,
    PowerLaw,
    Repeated,
    Runs,
    Saturating,
    bin_edges,
    frontier,
    optimum,
    pareto,
)

Form = Literal["power", "saturating", "additive", "repeated", "batched"]
Through = Literal["frontier", "all"]

LAWS: dict[str, type[Law]] = {
    "power": PowerLaw, "saturating": Saturating, "additive": Additive, "repeated": Repeated,
    "batched": Batched,
}  # fmt: skip
LEVEL = 0.95  # of every interval


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

    def draw(self, rng: np.random.Generator, draws: int) -> PowerLaw:
        """Draw lines that the points may mean as well, as power laws.

        With a point more than a line has parameters, one in thousands is steeper than any float.
        """
        scatter = _scatters(rng, self.noise, self.n - 2, draws)
        slope = self.slope + scatter / np.sqrt(self.x_spread) * rng.standard_normal(draws)
        height = self.intercept + self.slope * self.x_mean
        height = height + scatter / np.sqrt(self.n) * rng.standard_normal(draws)
        with np.errstate(over="ignore"):
            beta = np.exp(height - slope * self.x_mean)
        held = np.isfinite(beta) & (beta > 0)
        return PowerLaw(slope[held], beta[held])

    def at(self, x: Numbers, new: bool) -> Prediction:
        """The line at x; `new`: of one new measurement, otherwise of the line's own height."""
        variance = 1 / self.n + (x - self.x_mean) ** 2 / self.x_spread + new
        half = self.reach * self.noise * np.sqrt(variance)
        y = self.intercept + self.slope * x
        return Prediction(y, y - half, y + half)


def fit_line(x: Float[np.ndarray, " n"], y: Float[np.ndarray, "*R n"]) -> Line:
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
    drawn: PowerLaw  # what else the runs may mean, each parameter `[draws]`

    def interval(self, parameter: str) -> tuple[float, float]:
        """95% interval of a parameter of the law."""
        if parameter == "alpha":
            low, high = self.line.slope_interval()
            return float(low), float(high)
        at_one = self.line.at(0.0, new=False)
        return float(np.exp(at_one.low)), float(np.exp(at_one.high))

    def curve(self, size: Numbers, samples: Numbers, _: Numbers | None = None) -> Prediction:
        """Evaluate the law, with the interval of the law itself: the band of a plot."""
        return self._at(size, samples, new=False)

    def predict(self, size: Numbers, samples: Numbers, _: Numbers | None = None) -> Prediction:
        """Evaluate the law, with the interval for one new run: the band and a run's scatter."""
        return self._at(size, samples, new=True)

    def _at(self, size: Numbers, samples: Numbers, new: bool) -> Prediction:
        return Prediction(*map(np.exp, self.line.at(np.log(size * samples), new)))


# ------------------------------------------------------------------ the bootstrap


class BootstrapFit(NamedTuple):
    """A law through runs or their frontier, and the same law through resampled runs."""

    law: Law
    fitted: Runs  # what the law went through: the runs, or the bins of their frontier
    drawn: Law  # each parameter `[draws]`
    noise: float  # relative scatter around the law, for the degrees of freedom that are left
    freedom: int  # fitted points − parameters

    def interval(self, parameter: str) -> tuple[float, float]:
        """95% interval of a parameter of the law."""
        low, high = middle(getattr(self.drawn, parameter))
        return float(low), float(high)

    def curve(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Prediction:
        """Evaluate the law, with the interval of the law itself: the band of a plot."""
        curves = evaluate(self.drawn, size, samples, third)
        return Prediction(self.law(size, samples, third), *middle(curves))

    def predict(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Prediction:
        """Evaluate the law, with the interval for one new run: the band and a run's scatter."""
        curves = evaluate(self.drawn, size, samples, third)
        # One fixed seed: the same table gives the same interval.
        t = np.random.default_rng(0).standard_t(self.freedom, len(curves))
        scatter = np.exp(self.noise * t).reshape(-1, *(1,) * (curves.ndim - 1))
        return Prediction(self.law(size, samples, third), *middle(curves * scatter))


Fit = LineFit | BootstrapFit


def evaluate(drawn: Law, *at: Numbers | None) -> np.ndarray:
    """Evaluate every draw of a law: `[draws, ...]`."""
    given = np.broadcast_arrays(*(np.asarray(x, float) for x in at if x is not None))
    shape = (-1, *(1,) * given[0].ndim)
    return np.asarray(type(drawn)(*(np.reshape(p, shape) for p in drawn))(*given))


def middle(draws: np.ndarray) -> tuple[Numbers, Numbers]:
    """Return the 95% in the middle of draws, along the first axis."""
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
      form: `power` β·C^α; `saturating` E∞ + A·(C + B)^−α; `additive` E∞ + A·N^−a + B·D^−b;
        `repeated` and `batched`: that with samples that count less (see laws.py).
      runs: the measured runs.
      through: all runs, or the least error of each bin of compute.
      bins: of the frontier.
      draws: of the bootstrap.
      seed: of the bootstrap.

    Raises:
      InputError: too few points for the law's parameters, errors that are not positive, or an
        additive law through a frontier, whose bins have no size and no samples.
    """
    law, wanted = LAWS[form], len(LAWS[form]._fields) + 1
    if not (runs.error > 0).all():
        raise InputError(
            f"errors must be positive to have a logarithm; the least is {runs.error.min()}. For a "
            "metric that is better when larger, the error is 1 − metric, as a fraction."
        )
    if issubclass(law, OF_SIZE) and through == "frontier":
        raise InputError(f"the {form} law needs sizes and samples: fit it through all runs.")
    if law in (Repeated, Batched) and (runs.third is None or not (runs.third > 0).all()):
        what = "distinct samples" if law is Repeated else "batch"
        raise InputError(f"the {form} law needs the {what} of each run, more than 0.")
    edges = bin_edges(runs.compute, bins) if through == "frontier" else None
    fitted = runs if edges is None else _at_bins(runs, edges)
    if len(fitted.error) < wanted:
        raise InputError(
            f"{len(fitted.error)} points ({through}) cannot determine the {wanted - 1} parameters "
            f"of the {form} law and their scatter: it takes {wanted} or more."
        )
    rng = np.random.default_rng(seed)
    if form == "power" and edges is None:
        line = fit_line(np.log(runs.compute), np.log(runs.error))
        return LineFit(
            PowerLaw(line.slope, np.exp(line.intercept)), runs, line, line.draw(rng, draws)
        )

    once = np.ones((1, len(fitted.error)))
    point = law(*np.stack(estimate(law, fitted, fitted.error[None], once))[:, 0])
    freedom = len(fitted.error) - len(law._fields)
    residual = np.log(fitted.error / fitted.under(point))
    noise = float(np.sqrt(np.square(residual).sum() / freedom))
    if edges is None:
        scatter = _scatters(rng, noise, freedom, draws)[:, None]
        error = runs.under(point) * np.exp(scatter * rng.standard_normal((draws, len(residual))))
        drawn = estimate(law, runs, error, np.ones_like(error))
    else:
        drawn = _resampled(law, runs, edges, rng, draws)
    return BootstrapFit(law=point, fitted=fitted, drawn=drawn, noise=noise, freedom=freedom)


def _scatters(
    rng: np.random.Generator, noise: Numbers, freedom: int, draws: int
) -> Float[np.ndarray, " draws"]:
    """Draw what the standard deviation may be, given the residuals' own."""
    return noise * np.sqrt(freedom / rng.chisquare(freedom, draws))


def _at_bins(runs: Runs, edges: Float[np.ndarray, " edges"]) -> Runs:
    compute, error = frontier(runs.compute, runs.error, edges)
    full = np.isfinite(error)
    return Runs(compute[full], np.ones(full.sum()), error[full])


def _resampled(
    law: type[Law],
    runs: Runs,
    edges: Float[np.ndarray, " edges"],
    rng: np.random.Generator,
    draws: int,
) -> Law:
    """Fit the frontiers of runs drawn with replacement; every parameter is `[draws]`."""
    n = len(runs.error)
    counts = rng.multinomial(n, np.full(n, 1 / n), draws)
    compute, error = frontier(runs.compute, np.where(counts > 0, runs.error, np.inf), edges)
    full = np.isfinite(error)
    bins = Runs(compute, np.ones_like(compute), compute)  # whose errors are each draw's own
    drawn = np.stack(estimate(law, bins, np.where(full, error, 1.0), full.astype(float)))
    return law(*drawn[:, np.isfinite(drawn).all(axis=0)])  # a draw may hold one bin alone


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


def best(
    fit: Fit, compute: Float[np.ndarray, " C"], sizes: tuple[float, float]
) -> dict[str, Prediction]:
    """Divide compute as the law would have it: `size`, `samples` and `error`, with intervals.

    The size lies between the two of `sizes`. A law of compute alone has the size 1.
    """
    found = optimum(fit.law, compute, sizes)
    drawn = optimum(columns(fit.drawn), compute, sizes)
    return {
        name: Prediction(value, *middle(np.asarray(draws)))
        for name, value, draws in zip(Optimum._fields, found, drawn, strict=True)
    }


def columns(drawn: Law) -> Law:
    """Give draws a last axis, so that each is evaluated at several places: `[draws, places]`."""
    return type(drawn)(*(np.asarray(x)[:, None] for x in drawn))


class HoldOut(NamedTuple):
    """Runs that took no part in a fit, and what the fit says about them."""

    runs: Runs
    predicted: Prediction
    within: Bool[np.ndarray, " n"]  # whether the measured error fell into the interval
    relative_error: Float[np.ndarray, " n"]  # predicted / measured − 1


def hold_out(
    form: Form,
    runs: Runs,
    held: Bool[np.ndarray, " n"],
    through: Through = "frontier",
    *,
    bins: int = BINS,
    draws: int = 1_000,
    seed: int = 0,
) -> HoldOut:
    """Fit the runs that are not `held` and predict those that are: usually the largest.

    A fit through the frontier speaks of the best runs alone, so of the held-out ones those are
    predicted that no other run beats with as little compute. Raises InputError if none is left.
    """
    tested = held & pareto(runs) if through == "frontier" else held
    if not tested.any():
        raise InputError(
            f"nothing to predict: of {len(held)} runs {held.sum()} are held out, and none of these "
            f"is tested; their compute reaches {runs.compute.max():g}."
        )
    rest = fit(form, runs.where(~held), through, bins=bins, draws=draws, seed=seed)
    test = runs.where(tested)
    predicted = rest.predict(test.size, test.samples, test.third)
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
    share: Float[np.ndarray, " sizes"]  # of the bootstrap draws that choose each size


def allocate(fit: BootstrapFit, compute: float, sizes: Float[np.ndarray, " sizes"]) -> Choice:
    """Choose the size with the least predicted error when all of `compute` is spent.

    The fit must be of a law that tells sizes of equal compute apart.
    """
    samples = compute / sizes
    predicted = fit.predict(sizes, samples)
    best = int(np.argmin(predicted.error))
    choices = evaluate(fit.drawn, sizes, samples).argmin(axis=1)
    share = np.bincount(choices, minlength=len(sizes)) / len(choices)
    return Choice(best, float(samples[best]), predicted, share)
