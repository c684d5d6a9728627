"""Fit laws with uncertainty: intervals of parameters, of predictions, and of crossings of laws.

A law describes the error E, or another scale of it (`links.py`). All fits minimise squared
residuals of its logarithm. Runs that differ only in their seeds are one point, their geometric
mean.

- A power law is a line in log-log, with Student's t intervals, exact for Gaussian noise.
- Other laws have profile likelihood intervals with Student's t quantile (`profile.py`). Draws, for
  comparisons, are a parametric bootstrap: fits to errors and noise levels drawn around the fit.
- The published procedures `cherti` and `laion` are fitted again to resampled runs.

Residuals are tested for curvature, for runs of equal signs and for outliers.
benchmarks/coverage.py measures how often intervals contain the truth.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, special

from clip_jax.errors import InputError
from clip_jax.scaling import laion, laws
from clip_jax.scaling.law_forms import FORMS
from clip_jax.scaling.laws import Additive, Batched, Law, Numbers, Optimum, PowerLaw, Runs
from clip_jax.scaling.links import ERROR, Link
from clip_jax.scaling.profile import Interval, Region, region, slopes

Form = Literal["power", "saturating", "broken", "additive", "interaction", "repeated", "batched"]
Procedure = Literal["all", "frontier", "cherti", "laion"]
Sizes = tuple[float, float]  # smallest and largest size for a division of compute

LEVEL = 0.95  # of every interval
TAIL = (1 - LEVEL) / 2
FEW = 8  # points of which one may be an outlier
MISFIT = 2.0  # distance of points from a law, in standard deviations of a run, for a warning
EXACT = 1e-3  # residuals of log E below which no law is worth a warning
FEW_DRAWS = 200  # of a law whose draws are fitted one by one
REJECT = 0.01  # probability of a false warning, of each test
NEEDED: dict[str, str] = {
    "size": "model sizes",
    "samples": "numbers of samples",
    "compute": "amounts of compute",
    "third": "batch sizes or numbers of distinct samples",
}


class Prediction(NamedTuple):
    """Predicted errors, and the 95% interval of each."""

    error: Numbers
    low: Numbers
    high: Numbers


def middle(draws: np.ndarray) -> tuple[Numbers, Numbers]:
    """Return the central 95% interval of draws along the first axis."""
    low, high = np.quantile(draws, [TAIL, 1 - TAIL], axis=0)
    return low, high


def student(freedom: float) -> float:
    """Return the quantile of Student's t for intervals."""
    return float(special.stdtrit(freedom, 1 - TAIL))


class Points(NamedTuple):
    """Runs averaged over their seeds."""

    runs: Runs  # the geometric mean of each point's errors
    seeds: Float[np.ndarray, " n"]
    squares: Float[np.ndarray, " n"]  # of the seeds' log errors around the point's
    first: Int[np.ndarray, " n"]  # index of each point's first run

    def within(self) -> float:
        """Return the variance of log error between the seeds of a point; 0 without seeds."""
        return float(self.squares.sum() / max((self.seeds - 1).sum(), 1))

    def where(self, keep: Bool[np.ndarray, " n"]) -> "Points":
        kept = (x[keep] for x in (self.seeds, self.squares, self.first))
        return Points(self.runs.where(keep), *kept)


def averaged(runs: Runs, link: Link = ERROR) -> Points:
    """Average the runs of each setting, on the scale of a link.

    Without `Runs.setting`, runs of equal model and length are averaged.
    """
    columns = (runs.size, runs.samples, runs.third, runs.others)
    if runs.setting is not None:
        columns = (runs.setting,)
    keys = [str(key) for key in zip(*(x for x in columns if x is not None), strict=True)]
    number = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    point = np.array([number[key] for key in keys])
    first = np.unique(point, return_index=True)[1]
    seeds = np.bincount(point).astype(float)
    log = np.log(link.of(runs.error))
    mean = np.bincount(point, log) / seeds
    squares = np.bincount(point, np.square(log - mean[point]))
    points = runs.where(first)
    if points.binomial is not None:  # of the error; now of the log
        errors = link.error(np.exp(mean))
        points = points._replace(binomial=points.binomial * np.square(link.slope(errors)))
    return Points(points._replace(error=np.exp(mean)), seeds, squares, first)


@dataclass(frozen=True)
class Fit:
    """A law fitted to runs, with its uncertainty."""

    law: Law  # of the scale of `link`
    runs: Runs  # all of them, with their errors
    # Points of the fit, on the scale of `link`: runs averaged over seeds, or bins of a frontier.
    fitted: Runs
    weights: Float[np.ndarray, " n"]  # of the points, 1 on average
    seeds: Float[np.ndarray, " n"]  # of the points
    within: float  # variance of the log between the seeds of a point; 0 without seeds
    noise: float  # standard deviation of the log of a point of weight 1
    freedom: float  # degrees of freedom: points − parameters
    spread: float  # standard deviation of the log of one run
    bootstrap: tuple[int, int]  # number of draws, and seed
    resampled: Law | None = None  # draws of a published procedure
    link: Link = ERROR
    points: Points | None = None  # of `fitted`; None: of a published procedure

    @functools.cached_property
    def region(self) -> Region:
        """The laws that the points allow with 95%: a profile likelihood."""
        least = float((self.weights * self.residuals**2).sum())
        limit = least + (student(self.freedom) * self.noise) ** 2
        return region(self.law, self.fitted, self.weights, limit)

    @functools.cached_property
    def residuals(self) -> Float[np.ndarray, " n"]:
        """Residuals of the log of the points."""
        return np.asarray(np.log(self.fitted.error / self.fitted.under(self.law)))

    @functools.cached_property
    def drawn(self) -> Law:
        """Draws of the law: each parameter is `[draws]`."""
        if self.resampled is not None:
            return self.resampled
        draws, seed = self.bootstrap
        rng = np.random.default_rng(seed)
        points = self.fitted
        # Draws of the standard deviation, given that of the residuals.
        scatter = self.noise * np.sqrt(self.freedom / rng.chisquare(self.freedom, draws))
        normal = rng.standard_normal((draws, len(points.error))) / np.sqrt(self.weights)
        error = points.under(self.law) * np.exp(np.clip(scatter[:, None] * normal, -100, 100))
        kind = type(self.law)
        if isinstance(self.law, Batched) and self.law.has_batches(points):
            # A search of four exponents for each draw would take most of a minute.
            tables = (points._replace(error=x) for x in error[:FEW_DRAWS])
            each = [laws.fit_near(self.law, x, self.weights).parameters for x in tables]
            return kind(**{name: np.array([x[name] for x in each]) for name in kind.names()})
        drawn = kind.fitted(points, error, np.broadcast_to(self.weights, error.shape))
        # With three points, one line in thousands is too steep for a float.
        held = np.isfinite([*drawn.parameters.values()]).all(axis=0)
        return drawn.map(lambda x: x[held])

    def interval(self, parameter: str) -> Interval:
        """Return the 95% interval of a parameter of the law, and whether the search bounds it."""
        if self.resampled is not None:
            low, high = middle(getattr(self.resampled, parameter))
            is_open = parameter in self.law.COEFFICIENTS and low <= 0
            return Interval(float(low), float(high), bool(is_open))
        if not isinstance(self.law, PowerLaw):
            return self.region.parameter(parameter)
        if parameter == "alpha":
            half = student(self.freedom) * self.noise / math.sqrt(self._line[1])
            alpha = float(self.law.alpha)
            return Interval(alpha - half, alpha + half, False)
        _, low, high = self._curve(1.0, 1.0, None)  # beta is the law at one unit of compute
        return Interval(float(low), float(high), False)

    @property
    def _line(self) -> tuple[float, float]:
        """The mean of log C, and the sum of squares around it."""
        x = np.log(self.fitted.compute)
        mean = float((self.weights * x).sum() / self.weights.sum())
        return mean, float((self.weights * np.square(x - mean)).sum())

    def errors(self, runs: Runs) -> Numbers:
        """Return the error of each run by the law."""
        return self.link.error(runs.under(self.law))

    def curve(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Prediction:
        """Evaluate the law with its own interval, the band of a plot."""
        return self._as_errors(self._curve(size, samples, third))

    def _as_errors(self, values: Prediction) -> Prediction:
        return Prediction(*map(self.link.error, values))

    def _curve(self, size: Numbers, samples: Numbers, third: Numbers | None) -> Prediction:
        """Evaluate the law with its interval, on its own scale."""
        error = self.law(size, samples, third)
        if self.resampled is not None:
            return Prediction(error, *middle(self._draws(size, samples, third)))
        if isinstance(self.law, PowerLaw):
            mean, sum_of_squares = self._line
            away = (np.log(size * samples) - mean) ** 2 / sum_of_squares
            half = student(self.freedom) * self.noise * np.sqrt(1 / self.weights.sum() + away)
            return Prediction(error, error * np.exp(-half), error * np.exp(half))
        if third is None and isinstance(self.law, Batched):
            third = self.law.batch_to_use(samples)
        shape = np.shape(error)
        a, b, c = (np.broadcast_to(x, shape).ravel() for x in (size, samples, error))
        d = None if third is None else np.broadcast_to(third, shape).ravel()
        low, high = (np.reshape(x, shape) for x in self.region.law(Runs(a, b, c, d)))
        return Prediction(error, np.minimum(low, error), np.maximum(high, error))

    def predict(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> Prediction:
        """Evaluate the law with the interval of one new run, which includes its scatter."""
        error, low, high = self._curve(size, samples, third)
        scatter = student(self.freedom) * self.spread
        down, up = (np.hypot(np.log(error / x), scatter) for x in (np.maximum(low, 1e-300), high))
        with np.errstate(over="ignore"):
            return self._as_errors(Prediction(error, error * np.exp(-down), error * np.exp(up)))

    def draws(self, size: Numbers, samples: Numbers, third: Numbers | None = None) -> np.ndarray:
        """Return the errors of every draw of the law: `[draws, ...]`."""
        return np.asarray(self.link.error(self._draws(size, samples, third)))

    def _draws(self, size: Numbers, samples: Numbers, third: Numbers | None) -> np.ndarray:
        axes = np.broadcast(size, samples, *(() if third is None else (third,))).ndim
        drawn = self.drawn.map(lambda x: x.reshape(-1, *(1,) * axes))
        return np.asarray(drawn(size, samples, third))

    def best(self, compute: Float[np.ndarray, " C"], sizes: Sizes) -> tuple[Optimum, Optimum]:
        """Return the best division of compute by the law, `[C]`, and by each draw, `[draws, C]`."""
        drawn = self.drawn.map(lambda x: x[:, None])
        divisions = (law.optimum(compute, sizes) for law in (self.law, drawn))
        best, drawn_best = (x._replace(error=self.link.error(x.error)) for x in divisions)
        return best, drawn_best

    def lacking(self, parameter: str) -> str:
        """Return which runs would determine a parameter; empty if these do.

        They do if they have three values of every quantity that it depends on (or `Law.VALUES`),
        and if its interval ends before the bounds of the search, such as an irreducible error of
        zero.
        """
        needs = self.law.NEEDS[parameter]
        least = self.law.VALUES.get(parameter, 3)
        if few := [name for name in needs if self.fitted.values(name) < least]:
            number = {3: "three", 5: "five"}[least]
            return f"runs of at least {number} " + " and ".join(NEEDED[name] for name in few)
        if self.interval(parameter).open:
            return f"a wider range of {' and '.join(NEEDED[name] for name in needs)}, or less noise"
        return ""

    def unknown(self, size: float, samples: float, third: float | None = None) -> str:
        """Return which runs a prediction would need; empty if these runs determine it.

        One or two sizes say nothing about another size, and so for samples.
        """
        few = []
        values = {"size": size, "samples": samples, "compute": size * samples, "third": third}
        for name in sorted({x for names in self.law.NEEDS.values() for x in names}):
            value = values[name]
            held = getattr(self.fitted, name)
            if held is None or value is None:
                continue
            is_measured = np.abs(np.log(held / value)).min() < 0.02
            if not is_measured and self.fitted.values(name) < 3:
                few.append(NEEDED[name])
        return "runs of at least three " + " and ".join(few) if few else ""

    def misfit(self) -> list[str]:
        """Return warnings about residuals that do not look like noise."""
        if self.resampled is not None or np.abs(self.residuals).max() < EXACT:
            return []
        outlier = _outlier(self)
        return [*([] if outlier is None else [outlier[1]]), *_misfit(self)]

    def without_outliers(self) -> "Fit | None":
        """Fit again without points that lie too far from the law to be noise; None: there are none.

        At most one point in eight is left out.
        """
        fit = self
        for _ in range(max(len(self.seeds) // FEW, 1)):
            outlier = _outlier(fit) if fit.points else None
            if outlier is None or fit.points is None:
                break
            points = fit.points.where(np.arange(len(fit.seeds)) != outlier[0])
            fit = _fitted(type(self.law), self.runs, points, self.link, self.bootstrap)
        return None if fit is self else fit


def sizes_of(fits: Sequence[Fit]) -> Sizes:
    """Return the sizes allowed for the best division of compute: up to 10 times beyond the runs."""
    sizes = np.concatenate([fit.runs.size for fit in fits])
    return float(sizes.min() / 10), float(sizes.max() * 10)


def fit_law(
    form: Form,
    runs: Runs,
    procedure: Procedure = "all",
    *,
    bins: int = laws.BINS,
    draws: int = 1_000,
    seed: int = 0,
    link: Link = ERROR,
) -> Fit:
    """Fit one law to runs, averaged over their seeds.

    `procedure`: `all` points; `frontier`, the points that no other beats with at most their
    compute; `cherti`, the lowest error of each of some `bins` of compute, at the bin's centre
    (Cherti et al. 2023); `laion`, the best runs along compute, by least squares of the error itself
    (module `laion`). `draws` and `seed` are those of the bootstrap. `link` is the scale of the
    error that the law describes. Raises InputError for too few points, errors that are not
    positive, or a law in size and samples through a frontier.
    """
    kind = FORMS[form]
    if not (runs.error > 0).all():
        raise InputError(
            f"errors must be positive, but the lowest is {runs.error.min()}; a score must be a "
            "fraction, since its error is 1 − metric, and an error needs metric_is=error."
        )
    if issubclass(kind, Additive) and procedure != "all":
        raise InputError(f"the {form} law needs sizes and samples; set procedure=all.")
    if kind in (laws.Repeated, Batched) and (runs.third is None or not (runs.third > 0).all()):
        what = "distinct samples" if kind is laws.Repeated else "batch"
        raise InputError(f"the {form} law needs the {what} of each run, more than 0.")
    if not issubclass(kind, Additive) and runs.values("compute") < 2:
        raise InputError(
            f"all runs have about the same compute, {runs.compute[0]:.3g}; the {form} law needs "
            "runs of several."
        )
    if procedure in ("cherti", "laion") and link != ERROR:
        raise InputError(f"the procedure {procedure} fits the error; remove link={link.name}.")
    if procedure == "cherti":
        return _cherti(kind, form, runs, bins, (draws, seed))
    if procedure == "laion":
        return _laion(form, runs, (draws, seed))
    points = averaged(runs, link)
    if procedure == "frontier":
        points = points.where(laws.pareto(points.runs))
    _check_points(len(points.seeds), kind.free(points.runs), form)
    return _fitted(kind, runs, points, link, (draws, seed))


def _fitted(
    kind: type[Law], runs: Runs, points: Points, link: Link, bootstrap: tuple[int, int]
) -> Fit:
    """Fit by weighted least squares; the weights follow from the residuals, in three rounds.

    The variance of a point is that of a law's misfit + that of a run / seeds.
    """
    at = points.runs
    seeds = points.seeds
    count = len(at.error)
    parameters = kind.free(at)
    within = points.within()
    run = np.full(count, within)  # variance of one run of each point
    if at.binomial is not None:
        run = np.maximum(within - at.binomial.mean(), 0.0) + at.binomial
    known = run / seeds
    differs = np.ptp(known) > 1e-9 * known.mean()
    freedom = float(count - parameters)
    weights = np.ones(count)
    for _ in range(3 if differs else 1):
        law = laws.fit_one(kind, at, weights)
        residual = np.asarray(np.log(at.error / at.under(law)))
        noise = float(np.sqrt((weights * residual**2).sum() / freedom))
        used = weights
        if differs:
            variance = _misfit_variance(residual, known, freedom) + known
            weights = (1 / variance) / (1 / variance).mean()
    weights = used
    if at.run is not None:
        root = np.sqrt(weights)
        basis = _basis(slopes(law, at).T * root[:, None])
        alike, variance, freedom = _run_effects(at.run, root * residual, basis)
        weights = weights / alike
        noise = math.sqrt(variance)
    if at.binomial is not None:  # a scatter below the binomial noise is luck
        noise = max(noise, float((1 / known).mean() ** -0.5))
    spread = math.sqrt(noise**2 + float((run - known).mean()))
    return Fit(
        law=law,
        runs=runs,
        fitted=at,
        weights=weights,
        seeds=seeds,
        within=within,
        noise=noise,
        freedom=freedom,
        spread=spread,
        bootstrap=bootstrap,
        link=link,
        points=points,
    )


def _misfit_variance(
    residual: Float[np.ndarray, " n"], known: Float[np.ndarray, " n"], freedom: float
) -> float:
    """Return the variance that residuals have beyond the known one (Paule and Mandel 1982)."""

    def excess(variance: float) -> float:
        return float((residual**2 / (variance + known)).sum()) - freedom

    if excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, float((residual**2).sum() / freedom)))


def _run_effects(
    run: np.ndarray, residual: Float[np.ndarray, " n"], basis: Float[np.ndarray, "n p"]
) -> tuple[float, float, float]:
    """Estimate a random effect of each run, by which its checkpoints deviate alike.

    `basis` is an orthonormal one of what the law can express. Returns how many checkpoints count as
    one (the design effect of Kish 1965, section 5.4), the variance of a checkpoint, and its degrees
    of freedom (Satterthwaite 1946). The variances between and within runs are those that expect
    the sum of squares of the residuals and that of their sums over runs.
    """
    of = np.unique(run, return_inverse=True)[1]
    member = (of[:, None] == np.arange(of.max() + 1)).astype(float)  # [n, R]
    left = member - basis @ (basis.T @ member)  # of the runs' effects, after the fit of a law
    free = len(residual) - basis.shape[1]
    of_effects = np.square(left).sum()
    of_sums = np.square(member.T @ left).sum()
    squares = np.array([np.square(residual).sum(), np.square(member.T @ residual).sum()])
    expected = np.array([[free, of_effects], [of_effects, of_sums]])
    within, between = np.linalg.lstsq(expected, squares, rcond=1e-9)[0]
    total = squares[0] / max(float(expected[0] @ _shares(within, between)), 1e-9)
    unshared, shared = _shares(within, between)
    trace = unshared**2 * free + 2 * shared * unshared * of_effects + shared**2 * of_sums
    freedom = (unshared * free + shared * of_effects) ** 2 / max(trace, 1e-300)
    count = member.sum(0)
    alike = 1 + (np.square(count).sum() / count.sum() - 1) * shared
    return float(alike), float(total), max(float(freedom), 1.0)


def _shares(within: float, between: float) -> tuple[float, float]:
    """Return the shares of two variances, of which an estimate may be negative."""
    within, between = max(within, 0.0), max(between, 0.0)
    total = within + between
    return (within / total, between / total) if total > 0 else (1.0, 0.0)


# ------------------------------------------------------------------ published procedures


def _cherti(kind: type[Law], form: str, runs: Runs, bins: int, bootstrap: tuple[int, int]) -> Fit:
    """Fit the lowest error of each bin of compute, and those of runs drawn with replacement."""
    draws, seed = bootstrap
    n = len(runs.error)
    _check_points(n, len(kind.names()), form)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    error = np.where(np.concatenate([np.ones((1, n)), counts]) > 0, runs.error, np.inf)
    compute, error = laws.frontier(runs.compute, error, laws.bin_edges(runs.compute, bins))
    full = np.isfinite(error)
    points = int(full[0].sum())
    _check_points(points, len(kind.names()), form)
    axis = Runs(compute, np.ones_like(compute), compute)  # the errors differ between draws
    fits = kind.fitted(axis, np.where(full, error, 1.0), full.astype(float))
    held = np.isfinite(np.stack([*fits.parameters.values()])).all(axis=0)  # of several bins
    held = held & (np.arange(draws + 1) > 0)
    fitted = Runs(compute[full[0]], np.ones(points), error[0][full[0]])
    return _published(
        fits.map(lambda x: x[0]), runs, fitted, bootstrap, fits.map(lambda x: x[held])
    )


def _laion(form: str, runs: Runs, bootstrap: tuple[int, int]) -> Fit:
    """Fit the best runs along compute, and those of runs drawn with replacement."""
    draws, seed = bootstrap
    if form != "saturating":
        raise InputError(f"procedure=laion fits the form saturating, not {form}; omit --form.")
    candidates = laion.candidates(runs)
    n = len(candidates.error)
    points = laion.points(candidates) if n else candidates
    needed = len(laws.Saturating.names()) + 1
    if len(points.error) < needed:
        raise InputError(
            f"procedure=laion selects {len(points.error)} of {len(runs.error)} runs, but needs "
            f"{needed}; it takes the best runs along compute, from {laion.LEAST:g} to "
            f"{laion.MOST:g} GFLOPs x pairs. Choose another --procedure."
        )
    rng = np.random.default_rng(seed)
    drawn = [laion.points(candidates.where(rng.integers(n, size=n))) for _ in range(draws)]
    fits = [laion.fitted(x) for x in (points, *drawn) if len(x.error) >= needed]
    every = laws.Saturating(*np.array(fits).T)
    law = every.map(lambda x: x[0])
    return _published(law, runs, points, bootstrap, every.map(lambda x: x[1:]))


def _published(
    law: Law, runs: Runs, fitted: Runs, bootstrap: tuple[int, int], resampled: Law
) -> Fit:
    """Return the fit of a published procedure, whose intervals are those of resampled runs."""
    points = len(fitted.error)
    freedom = points - len(law.names())
    noise = float(np.sqrt(np.square(np.log(fitted.error / fitted.under(law))).sum() / freedom))
    return Fit(
        law=law,
        runs=runs,
        fitted=fitted,
        weights=np.ones(points),
        seeds=np.ones(points),
        within=0.0,
        noise=noise,
        freedom=freedom,
        spread=noise,
        bootstrap=bootstrap,
        resampled=resampled,
    )


def _check_points(points: int, parameters: int, form: str) -> None:
    if points <= parameters:
        raise InputError(
            f"{points} points cannot determine the {parameters} parameters of the {form} law and "
            f"its scatter; it needs at least {parameters + 1}."
        )


# ------------------------------------------------------------------ does the law fit?


def _misfit(fit: Fit) -> list[str]:
    """Test the residuals for curvature (an F test) and for runs of equal signs."""
    points = fit.fitted
    root = np.sqrt(fit.weights / fit.weights.mean())
    basis, residual = _residuals(fit)
    extra = _curves(fit.law, points) * root[:, None]
    added = _basis(extra - basis @ (basis.T @ extra), np.linalg.norm(extra, axis=0).max(initial=1))
    k = added.shape[1]
    rest = len(residual) - basis.shape[1] - k
    share = float(np.square(added.T @ residual).sum() / max(np.square(residual).sum(), 1e-300))
    # P(F > f) by the incomplete beta function.
    p = special.betainc(rest / 2, k / 2, 1 - share) if k and rest > 0 else 1.0
    if p < REJECT:
        return [
            f"the law misfits: residuals of up to {_worst(fit):.1%} "
            f"depend on the size, the samples or other settings of the runs (p = {p:.1g}); try "
            "another --form, divide the runs with --compare, or exclude some with --where."
        ]
    excess = fit.noise**2 - fit.within * float((1 / fit.seeds).mean())
    if fit.freedom > 1 and 0 < MISFIT**2 * fit.within < excess:
        return [
            f"the law misfits: points lie {math.sqrt(excess):.1%} from it, seeds of a point only "
            f"{math.sqrt(fit.within):.1%} from each other; try another --form."
        ]
    signs = residual[np.argsort(points.compute, kind="stable")] > 0
    if len(signs) >= 10 and (p := _few_runs(signs)) < REJECT / 2:
        what = "residuals keep their sign along compute"
        return [f"the law misfits: {what} (p = {p:.1g}); try another --form."]
    return []


def _worst(fit: Fit) -> float:
    """Return the largest deviation of an error from the law, relative."""
    errors = fit.link.error(fit.fitted.error) / fit.errors(fit.fitted)
    return float(np.abs(errors - 1).max())


def _residuals(fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Return an orthonormal basis of what the law can express, and the residuals outside of it.

    The squares of the residuals sum to the degrees of freedom.
    """
    root = np.sqrt(fit.weights / fit.weights.mean())
    basis = _basis(slopes(fit.law, fit.fitted).T * root[:, None])
    residual = fit.residuals * root / max(fit.noise, 1e-12)
    return basis, residual - basis @ (basis.T @ residual)


def _outlier(fit: Fit) -> tuple[int, str] | None:
    """Return the point that lies too far from the law to be noise, and a warning: a t test."""
    if fit.freedom <= 2 or np.abs(fit.residuals).max() < EXACT:
        return None
    basis, residual = _residuals(fit)
    lever = np.clip(1 - np.square(basis).sum(1), 1e-9, 1)
    off = np.square(residual) / lever / fit.freedom
    worst = int(np.argmax(off))
    t = math.sqrt(off[worst] * (fit.freedom - 1) / max(1 - off[worst], 1e-9))
    p = 2 * float(special.stdtr(fit.freedom - 1, -t)) * len(residual)
    if p >= REJECT:
        return None
    points = fit.fitted
    at = f"{points.size[worst]:.4g} GMACs, {points.samples[worst]:.3g} pairs"
    value = points.error[worst]
    by_law = fit.link.error(value / np.exp(fit.residuals[worst]))
    deviation = float(fit.link.error(value) / by_law) - 1
    model = "" if points.model is None else f"{points.model[worst]}: "
    return worst, (
        f"one point lies {deviation:+.1%} from the law ({model}{at}; p = {p:.1g}), too far to be "
        "noise; check that run."
    )


def _basis(matrix: np.ndarray, scale: float | None = None) -> np.ndarray:
    """Return an orthonormal basis of the columns, without those that almost depend on others."""
    unit = np.linalg.norm(matrix, axis=0) if scale is None else scale
    vectors, values, _ = np.linalg.svd(matrix / np.maximum(unit, 1e-300), full_matrices=False)
    return vectors[:, values > 1e-3 if scale else values > 1e-6]


def _curves(law: Law, runs: Runs) -> np.ndarray:
    """Return directions in which a law that misfits leaves residuals, `[n, k]`."""

    def standard(x: np.ndarray) -> np.ndarray:
        x = np.log(x) - np.log(x).mean()
        return x / max(x.std(), 1e-9) if x.std() > 1e-6 else 0 * x

    if not isinstance(law, Additive):
        compute = standard(runs.compute)
        curves = [standard(runs.size), compute**2]
    else:
        size, samples = standard(runs.size), standard(runs.samples)
        curves = [size**2, samples**2, size * samples]
    others = [] if runs.others is None else map(standard, runs.others.T)
    return np.stack([*curves, *others], axis=-1)


def _few_runs(signs: Bool[np.ndarray, " n"]) -> float:
    """Return the probability of so few runs of equal signs (Wald and Wolfowitz 1940)."""
    plus, minus, n = int(signs.sum()), int((~signs).sum()), len(signs)
    if not plus or not minus:
        return 1.0
    mean = 1 + 2 * plus * minus / n
    spread = math.sqrt(max((mean - 1) * (mean - 2) / (n - 1), 1e-12))
    runs = 1 + int((signs[1:] != signs[:-1]).sum())
    return float(special.ndtr((runs + 0.5 - mean) / spread))
