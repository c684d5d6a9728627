"""Fit laws to a table, choose between them by validation, and predict runs with intervals."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from clip_jax.errors import InputError
from clip_jax.scaling import validation
from clip_jax.scaling.laws import Additive, Batched, Runs
from clip_jax.scaling.links import LEAST, LinkName, from_margins, link_of, margins
from clip_jax.scaling.uncertainty import Fit, Form, Prediction, averaged, fit_law
from clip_jax.scaling.validation import Candidate, Validation

OF_COMPUTE: tuple[Form, ...] = ("power", "saturating", "broken")
OF_SIZES: tuple[Form, ...] = ("additive", "interaction", "power", "saturating")
LEVELS = 31  # of chance, that are tried at once
MOST_CHANCE = 1.5  # highest level of chance that is tried, as a multiple of the lowest score
POINTS = 7  # of different size or samples, which the additive law needs to be the default
MOST_DIGITS = 6  # after the decimal point, of tables that round their metric
EXACTLY = 1e-9  # share of a number by which rounding of floats may change it


class Forecast(NamedTuple):
    """A predicted error, and the 95% interval of one new run."""

    prediction: Prediction
    validated: bool  # whether the interval has been calibrated for this extrapolation


@dataclass(frozen=True)
class Laws:
    """Laws of a table that predict equally well, and their validation."""

    fits: Sequence[Fit]  # the one with the fewest parameters first
    candidates: Sequence[Candidate]  # of the fits
    is_score: bool
    validation: Validation | None = None  # None: the table has too few runs, or a procedure's fit

    @functools.cached_property
    def resolution(self) -> float:
        """The step to which the table rounds its errors; 0: none."""
        return resolution(self.fit.runs.error)

    @property
    def fit(self) -> Fit:
        """The simplest law."""
        return self.fits[0]

    def without_outliers(self) -> "Laws | None":
        """Fit the simplest law without its outliers; None: there are none."""
        fit = self.fit.without_outliers()
        return None if fit is None else Laws([fit], self.candidates[:1], self.is_score)

    def unknown(self, size: float, samples: float, third: float | None = None) -> str:
        """Return which runs a prediction would need; empty if these runs determine it."""
        return self.fit.unknown(size, samples, third)

    def predict(self, size: float, samples: float, third: float | None = None) -> Forecast:
        """Predict one run; see `predict_all`."""
        thirds = None if third is None else np.array([third])
        return self.predict_all(np.array([size]), np.array([samples]), thirds)[0]

    def predict_all(
        self,
        size: Float[np.ndarray, " n"],
        samples: Float[np.ndarray, " n"],
        third: Float[np.ndarray, " n"] | None = None,
    ) -> list[Forecast]:
        """Return the laws' mean prediction of each run, with the interval of one new run.

        The interval is the wider of the laws' own and the calibrated one, and half a step wider on
        both sides if the table rounds its errors. Laws that do not determine a run do not count,
        unless none does.
        """
        if third is None and isinstance(self.fit.law, Batched):
            third = np.asarray(self.fit.law.batch_to_use(samples))
        least = LEAST if self.is_score else None
        thirds = [None] * len(size) if third is None else third.tolist()
        runs = [*zip(size.tolist(), samples.tolist(), thirds, strict=True)]
        each = np.stack(
            [margins(np.array(x.predict(size, samples, third)), least) for x in self.fits]
        )
        knows = np.array([[not x.unknown(*run) for run in runs] for x in self.fits])
        knows[0] |= ~knows.any(0)
        margin, low, high = np.where(knows[:, None], each, 0.0).sum(0) / knows.sum(0)
        error, low, high = np.asarray(from_margins(np.stack([margin, low, high]), self.is_score))
        halves: list[float | None] = [None] * len(runs)
        if self.validation:
            halves = [self.validation.half_width(n, d, self.fit.runs) for n, d, _ in runs]
            calibrated = self.validation.around(margin, np.array([x or 0.0 for x in halves]))
            low, high = np.minimum(low, calibrated[0]), np.maximum(high, calibrated[1])
        low = np.maximum(low - self.resolution / 2, 0.0)
        high = np.minimum(high + self.resolution / 2, 1.0 if self.is_score else np.inf)
        columns = zip(error.tolist(), low.tolist(), high.tolist(), halves, strict=True)
        return [Forecast(Prediction(*ends), half is not None) for *ends, half in columns]


def resolution(values: Float[np.ndarray, " n"]) -> float:
    """Return the largest of 1, 0.1, ..., 1e-6 that divides all values; 0: none does."""
    for digits in range(MOST_DIGITS + 1):
        scaled = values * 10.0**digits
        if (np.abs(scaled - np.round(scaled)) <= EXACTLY * scaled).all():
            return 10.0**-digits
    return 0.0


def default_form(tables: Sequence[Runs]) -> Form:
    """Return `additive` if all tables have three sizes, three lengths and seven points."""
    for runs in tables:
        points = {*zip(runs.size.tolist(), runs.samples.tolist(), strict=True)}
        three = min(runs.values("size"), runs.values("samples")) >= 3
        if not three or len(points) < POINTS:
            return "power"
    return "additive"


def fitted_guesses(form: Form, name: LinkName, runs: Runs, is_score: bool) -> float:
    """Return the error of random guesses with which a law comes closest to runs.

    How close it comes is the sum of squared differences of margins, which does not depend on the
    scale of the law. Levels of chance are searched on a grid, and then between its best level's
    neighbours. Scores: from 0 to 1.5 times the lowest. Losses: from the highest to 11 times that.
    """
    points = averaged(runs).runs
    highest = float(points.error.max())
    least = None
    if is_score:
        lowest = float((1 - points.error).min())
        least = max(lowest / 2, LEAST)
        levels = 1 - np.linspace(0, MOST_CHANCE * lowest, LEVELS)
    else:
        levels = highest * (1 + np.geomspace(1e-3, 10, LEVELS))
    measured = margins(points.error, least)
    for _ in range(2):
        links = [link_of(name, points.error, level) for level in levels.tolist()]
        values = np.stack([np.asarray(link.of(points.error)) for link in links])
        law = Candidate(form, links[0]).kind.fitted(points, values, np.ones_like(values))
        with np.errstate(all="ignore"):
            fitted = points.under(law.map(lambda x: x[:, None]))
            pairs = zip(links, np.asarray(fitted), strict=True)
            predicted = margins(np.stack([np.asarray(x.error(y)) for x, y in pairs]), least)
        off = np.square(predicted - measured).sum(1)
        best = int(np.nanargmin(off))
        result = float(levels[best])
        levels = np.linspace(levels[max(best - 1, 0)], levels[min(best + 1, LEVELS - 1)], LEVELS)
    return result


def fit_laws(
    candidates: Sequence[Candidate], runs: Runs, is_score: bool, *, draws: int, seed: int = 0
) -> Laws:
    """Validate candidates, and fit those that predict best to all runs.

    The first candidate is fitted where validation cannot choose. Raises InputError if the runs are
    too few for the first candidate.
    """
    validated = None
    if (runs.error > 0).all() and len(runs.error) > 1:
        validated = validation.validate(candidates, runs, is_score)
    chosen = validated.chosen if validated else candidates[:1]
    fits: list[Fit] = []
    fitted: list[Candidate] = []
    for candidate in chosen:
        try:
            fit = fit_law(candidate.form, runs, draws=draws, seed=seed, link=candidate.link)
        except InputError:
            if len(candidates) == 1 or (candidate == chosen[-1] and not fits):
                raise
            continue
        fits.append(fit)
        fitted.append(candidate)
    return Laws(fits, fitted, is_score, validated)


def divides(form: Form) -> bool:
    """Return whether a form distinguishes size and samples."""
    return issubclass(Candidate(form, validation.Link()).kind, Additive)
