"""Validate laws by predicting the dearer runs of a table from the cheaper ones.

Rolling-origin validation, as for forecasts of time series (Tashman 2000): the table is cut at many
levels of compute, for laws of size and samples also at levels of these. At each cut a law is fitted
to the runs below and predicts the runs above. The errors of these predictions choose between laws,
and calibrate the interval of a new run for its extrapolation factor: its compute, size or samples
over the largest of the fitted runs, whichever is more. The quantile of the errors has the
correction of conformal prediction for finite samples (Vovk et al. 2005, section 2.2). It assumes
that laws will err beyond the table as they did within.

Errors are differences of margins: logits of scores, or logarithms of errors (`links.margins`). For
intervals, they are differences of the metric itself if these depend less on its level.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from clip_jax.scaling.law_forms import FORMS
from clip_jax.scaling.laws import Additive, Law, Runs
from clip_jax.scaling.links import LEAST, Link, from_margins, margins
from clip_jax.scaling.uncertainty import LEVEL, Form, averaged

CUTS = {"compute": 20, "size": 6, "samples": 6}  # most cuts of a table
MOST = 300  # most points of a table that validation fits, and most runs that it predicts
FOLDS = 5  # parts of the runs of checkpoints, each predicted by the others
SPARE = 2  # points of the cheapest cut beyond the parameters of a law
ENOUGH = 19  # errors of which the largest bounds a new one with 95%
NEAR = np.log(3)  # errors at factors up to three times smaller or larger are comparable
RECENT = 1 / 3  # share of the points of a fit that a cut has to have, to be comparable
FAR = np.log(10)  # largest factor of errors that choose between laws


class Candidate(NamedTuple):
    """A form of law on a scale of the error."""

    form: Form
    link: Link

    @property
    def kind(self) -> type[Law]:
        return FORMS[self.form]

    def __str__(self) -> str:
        return describe(self.form, self.link.name)


def describe(form: str, link: str) -> str:
    """Name a law: `additive law` or `additive law of the odds`."""
    scale = {"error": "", "odds": " of the odds", "log_score": " of the log score"}
    return f"{form} law{scale[link]}"


class Group(NamedTuple):
    """Predictions of runs at similar extrapolation factors."""

    low: float  # factors above this one
    high: float  # up to this one
    predictions: int
    off: float  # median difference of the predicted and the measured metric
    checked: int  # predictions that have an interval from cheaper cuts alone
    width: float  # median width of these intervals, in units of the metric
    inside: float  # share of the measured metrics inside of them


GROUPS = (1.0, 3.0, 10.0, np.inf)  # ends of the groups of factors


@dataclass(frozen=True)
class Validation:
    """Predictions of dearer runs from cheaper ones, by laws that were chosen by them.

    Predictions are ordered by the number of points of their cut, the most first.
    """

    # Laws whose predictions are averaged since they predict equally well, the simplest first.
    chosen: Sequence[Candidate]
    offs: Mapping[Candidate, float]  # mean absolute error of each candidate, in margins
    is_score: bool
    total: int  # number of points of the table
    cuts: "Cuts"
    cut: Int[np.ndarray, " m"]  # index of a prediction's cut
    points: Int[np.ndarray, " m"]  # number of points that its law was fitted to
    run: Int[np.ndarray, " m"]  # index of the predicted run in `cuts.runs`
    factor: Float[np.ndarray, " m"]  # log of the extrapolation factor
    predicted: Float[np.ndarray, " m"]  # margins
    measured: Float[np.ndarray, " m"]

    @functools.cached_property
    def in_metric(self) -> bool:
        """Whether differences of the metric depend less on its level than those of margins."""
        near = self.factor <= FAR
        if near.sum() < ENOUGH:
            return False
        measured, predicted = self.measured[near], self.predicted[near]
        by_margin = np.abs(measured - predicted)
        by_metric = np.abs(self.metric(measured) - self.metric(predicted))
        return _dependence(by_metric, predicted) < _dependence(by_margin, predicted)

    @functools.cached_property
    def off(self) -> Float[np.ndarray, " m"]:
        """How far each prediction is off: a difference of the metric or of margins."""
        if self.in_metric:
            return np.abs(self.metric(self.measured) - self.metric(self.predicted))
        return np.abs(self.measured - self.predicted)

    def half_width(self, size: float, samples: float, fitted: Runs) -> float | None:
        """Return half of the 95% interval of a new run, in units of `off`; None: not validated."""
        at = np.array([size]), np.array([samples])
        factor = float(factors(*at, fitted, self.cuts.divides)[0])
        return half_width(self.off, self.factor, self.points, self.total, factor)

    def around(self, margin: np.ndarray, half: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the errors `half` below and above those of margins, in units of `off`."""
        if not self.in_metric:
            low, high = (from_margins(margin + sign * half, self.is_score) for sign in (-1, 1))
            return np.asarray(low), np.asarray(high)
        error = from_margins(margin, self.is_score)
        most = 1.0 if self.is_score else np.inf
        return np.maximum(error - half, 0.0), np.minimum(error + half, most)

    def checked(self) -> tuple[Float[np.ndarray, " m"], Bool[np.ndarray, " m"]]:
        """Return the half width of each prediction's interval from smaller cuts, and if it holds.

        Only runs below a prediction's cut calibrate its interval, which is NaN if they are too few.
        """
        off = self.off
        half = np.full(len(off), np.nan)
        smaller = self.cuts.smaller()
        for cut in np.unique(self.cut):
            known = smaller[self.cut, cut] & self.cuts.fitted[cut, self.run]
            for i in np.flatnonzero(self.cut == cut):
                now = int(self.points[i])
                calibration = off[known], self.factor[known], self.points[known], now
                width = half_width(*calibration, float(self.factor[i]))
                half[i] = np.nan if width is None else width
        return half, off <= half

    def metric(self, margin: np.ndarray) -> np.ndarray:
        """Return the metric of margins: the score, or the error."""
        error = np.asarray(from_margins(margin, self.is_score))
        return 1 - error if self.is_score else error

    def groups(self) -> list[Group]:
        """Summarise the predictions by factor; groups without predictions are left out."""
        half, inside = self.checked()
        off = np.abs(self.metric(self.measured) - self.metric(self.predicted))
        width = np.subtract(*self.around(self.predicted, half)[::-1])
        groups = []
        for low, high in pairwise(GROUPS):
            held = (self.factor > np.log(low)) & (self.factor <= np.log(high))
            has = held & np.isfinite(half)
            if held.any():
                share = float(inside[has].mean()) if has.any() else np.nan
                typical = float(np.median(width[has])) if has.any() else np.nan
                off_by = float(np.median(off[held]))
                group = Group(low, high, int(held.sum()), off_by, int(has.sum()), typical, share)
                groups.append(group)
        return groups


def _dependence(off: Float[np.ndarray, " m"], level: Float[np.ndarray, " m"]) -> float:
    """Return the absolute rank correlation of errors with the level (Spearman 1904)."""
    ranks = np.stack([off, level]).argsort(axis=1, kind="stable").argsort(axis=1)
    return abs(float(np.corrcoef(ranks)[0, 1]))


def half_width(
    off: Float[np.ndarray, " m"],
    factor: Float[np.ndarray, " m"],
    points: Int[np.ndarray, " m"],
    now: int,
    at: float,
) -> float | None:
    """Return the conformal quantile of errors that are comparable to those of a new run.

    These are errors at factors up to three times smaller or larger than `at`, a logarithm, by fits
    of at least a third of `now` points. If fewer than 19 of these reach as far as `at`, smaller
    fits count, too. None: fewer than 19 errors do.
    """
    at = max(at, 0.0)
    far = np.sort(points[factor >= at])[::-1]
    if len(far) < ENOUGH:
        return None
    used = points >= min(int(far[ENOUGH - 1]), RECENT * now)
    away = np.abs(factor[used] - at)
    near = np.sort(off[used][away <= max(NEAR, np.sort(away)[ENOUGH - 1])])
    rank = int(np.ceil(LEVEL * (len(near) + 1)))
    return float(near[min(rank, len(near)) - 1])


# ------------------------------------------------------------------ cuts


class Cuts(NamedTuple):
    """The cuts of a table: K fits to its n points, each of which predicts a run of other points."""

    points: Runs  # runs averaged over seeds
    runs: Runs  # one run of each point
    fitted: Bool[np.ndarray, "K n"]
    tested: Bool[np.ndarray, "K n"]
    divides: bool  # whether size and samples count besides compute

    def smaller(self) -> Bool[np.ndarray, "K K"]:
        """Return whether all points of the first cut are points of the second, which has more."""
        fitted = self.fitted.astype(float)
        count = fitted.sum(1)
        return (fitted @ fitted.T >= count[:, None] - 0.5) & (count[:, None] < count)

    def factors(self) -> Float[np.ndarray, "K n"]:
        """Return the logs of the extrapolation factors of the runs from each cut."""
        at = self.runs.size, self.runs.samples
        below = (self.points.where(fitted) for fitted in self.fitted)
        return np.stack([factors(*at, x, self.divides) for x in below])


def factors(
    size: Float[np.ndarray, " n"], samples: Float[np.ndarray, " n"], fitted: Runs, divides: bool
) -> Float[np.ndarray, " n"]:
    """Return logs of extrapolation factors: how far runs lie beyond the largest fitted ones."""
    ratios = [size * samples / fitted.compute.max()]
    if divides:
        ratios += [size / fitted.size.max(), samples / fitted.samples.max()]
    return np.log(np.max(ratios, axis=0))


def cuts_of(runs: Runs, parameters: int, divides: bool) -> Cuts:
    """Cut a table at levels of compute, size and samples that have enough points below.

    Of the seeds of a point, one run is predicted, as the errors of the others are almost the same.
    Where rows are checkpoints, each fifth of the runs is predicted by fits to the other runs.
    """
    averages = averaged(runs)
    some = _some(averages.runs)
    points = averages.runs.where(some)
    fold = np.zeros(len(some), int)
    if points.run is not None:
        fold = np.unique(points.run, return_inverse=True)[1] % FOLDS
    folds = np.unique(fold)
    fitted, tested = [], []
    for name in ("compute", "size", "samples") if divides else ("compute",):
        values = getattr(points, name)
        for level in _levels(values, parameters, name, len(folds)):
            below = values <= level
            for held in folds:
                others = below if len(folds) == 1 else below & (fold != held)
                test = ~below & (fold == held)
                if others.sum() >= parameters + SPARE and test.any():
                    fitted.append(others)
                    tested.append(test)
    shape = len(fitted), len(some)
    masks = (np.reshape(np.array(x, bool), shape) for x in (fitted, tested))
    return Cuts(points, runs.where(averages.first[some]), *masks, divides)


def _some(runs: Runs) -> Int[np.ndarray, " k"]:
    """Return the indices of runs by compute; of many, some that are evenly spaced."""
    order = np.argsort(runs.compute, kind="stable")
    if len(order) <= MOST:
        return order
    return order[np.linspace(0, len(order) - 1, MOST).round().astype(int)]


def _levels(
    values: Float[np.ndarray, " p"], parameters: int, name: str, folds: int
) -> Float[np.ndarray, " L"]:
    """Return levels between distinct values, with enough points below."""
    values = np.sort(values)
    rises = np.flatnonzero(np.diff(np.log(values)) > 1e-4)
    if name != "compute":
        rises = rises[2:]  # one or two sizes say nothing about another one
    rises = rises[rises + 1 >= parameters + SPARE]
    most = max(CUTS[name] // folds, 3)
    if len(rises) > most:
        rises = rises[np.unique(np.linspace(0, len(rises) - 1, most).round().astype(int))]
    return np.sqrt(values[rises] * values[rises + 1])


def _predictions(candidate: Candidate, cuts: Cuts) -> Float[np.ndarray, "K n"]:
    """Return the errors that a candidate predicts from each cut; NaN: not determined."""
    kind, link = candidate.kind, candidate.link
    points = _on_scale(cuts.points, link)
    weights = cuts.fitted.astype(float)
    if points.binomial is not None:
        weights = weights / (points.binomial.mean() + points.binomial)
    law = kind.fitted(points, points.error[None], weights).map(lambda x: x[:, None])
    predicted = np.asarray(link.error(cuts.runs.under(law)))
    return np.where(_is_determined(kind, cuts), predicted, np.nan)


def _on_scale(points: Runs, link: Link) -> Runs:
    """Return points on the scale of a link."""
    binomial = points.binomial
    if binomial is not None:
        binomial = binomial * np.square(link.slope(points.error))
    return points._replace(error=np.asarray(link.of(points.error)), binomial=binomial)


def _is_determined(kind: type[Law], cuts: Cuts) -> Bool[np.ndarray, "K n"]:
    """Return which runs a cut determines: one or two sizes say nothing about another one."""
    determined = np.ones(cuts.fitted.shape, bool)
    for name in sorted({name for names in kind.NEEDS.values() for name in names}):
        values = getattr(cuts.points, name)
        if values is None:
            continue
        close = np.abs(np.log(values[:, None] / values)) < 0.02
        measured = cuts.fitted.astype(float) @ close.T > 0
        for k, fitted in enumerate(cuts.fitted):
            if cuts.points.where(fitted).values(name) < 3:
                determined[k] &= measured[k]
    return determined


# ------------------------------------------------------------------ choice


def validate(candidates: Sequence[Candidate], runs: Runs, is_score: bool) -> Validation | None:
    """Predict dearer runs from cheaper ones by all candidates, and choose the best.

    Candidates whose mean absolute error is within one standard error of the best one's count as
    equal (Diebold and Mariano 1995). None: the table has no cut, or no candidate predicts anything.
    """
    most = max(len(candidate.kind.names()) for candidate in candidates)
    divides = issubclass(candidates[0].kind, Additive)
    cuts = cuts_of(runs, most, divides)
    if not len(cuts.fitted):
        return None
    least = None
    if is_score:
        scores = 1 - runs.error
        least = max(float(scores[scores > 0].min(initial=1.0)) / 2, LEAST)
    measured = np.asarray(margins(cuts.runs.error, least))
    factor = cuts.factors()
    predicted: dict[Candidate, np.ndarray] = {}
    with np.errstate(all="ignore"):
        for candidate in candidates:
            errors = _predictions(candidate, cuts)
            predicted[candidate] = np.asarray(margins(errors, least))
    held = {x: cuts.tested & np.isfinite(y) for x, y in predicted.items()}
    most = max(int(x.sum()) for x in held.values())
    if not most:
        return None
    usable = [x for x in candidates if 2 * held[x].sum() >= most]
    common = np.logical_and.reduce([held[x] for x in usable])
    off = {x: np.abs(measured - predicted[x]) for x in usable}
    chosen = _best(off, common, factor) if common.sum() >= ENOUGH else usable[:1]
    mean = np.mean([predicted[x] for x in chosen], axis=0)
    held_by_all = cuts.tested & np.isfinite(mean)
    count = cuts.fitted.sum(1)
    cut, run = np.nonzero(held_by_all)
    order = np.argsort(-count[cut], kind="stable")
    cut, run = cut[order], run[order]
    return Validation(
        chosen=chosen,
        offs={x: float(off[x][common].mean()) if common.any() else np.nan for x in usable},
        is_score=is_score,
        total=len(cuts.points.error),
        cuts=cuts,
        cut=cut,
        points=count[cut],
        run=run,
        factor=factor[cut, run],
        predicted=mean[cut, run],
        measured=measured[run],
    )


def _best(
    off: Mapping[Candidate, Float[np.ndarray, "K n"]],
    common: Bool[np.ndarray, "K n"],
    factor: Float[np.ndarray, "K n"],
) -> list[Candidate]:
    """Return the candidates that predict equally well, those of fewest parameters first."""
    near = common & (factor <= FAR)
    rows = near.any(1)
    if not rows.any():
        near, rows = common, common.any(1)
    count = near[rows].sum(1)
    of_cut = {x: np.where(near, y, 0.0)[rows].sum(1) / count for x, y in off.items()}
    best = min(of_cut, key=lambda x: of_cut[x].mean())
    chosen = []
    for candidate, offs in of_cut.items():
        worse = offs - of_cut[best]
        if candidate == best or worse.mean() <= _standard_error(worse):
            chosen.append(candidate)
    return sorted(chosen, key=lambda x: (len(x.kind.names()), of_cut[x].mean()))


def _standard_error(series: Float[np.ndarray, " K"]) -> float:
    """Return the standard error of a mean of successive cuts, which share runs and so correlate.

    The effective number of values is that of an autoregressive process of first order.
    """
    if len(series) < 3:
        return 0.0
    away = series - series.mean()
    square = float(np.square(away).mean())
    correlation = float((away[1:] * away[:-1]).mean()) / max(square, 1e-300)
    correlation = min(max(correlation, 0.0), 1 - 1 / len(series))
    effective = len(series) * (1 - correlation) / (1 + correlation)
    return float(np.sqrt(square / max(effective, 1.0)))
