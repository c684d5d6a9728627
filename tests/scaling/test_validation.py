"""Cuts of a table, the calibrated interval, and the choice between laws."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clip_jax.scaling.forecast import OF_SIZES, Laws, default_form, fit_laws, resolution
from clip_jax.scaling.laws import Runs
from clip_jax.scaling.links import ERROR, from_margins, link_of, margins
from clip_jax.scaling.uncertainty import Form
from clip_jax.scaling.validation import (
    CUTS,
    ENOUGH,
    Candidate,
    Cuts,
    cuts_of,
    factors,
    half_width,
    validate,
)
from tests.scaling.known import KNOWN, measured


def scores(seed: int = 0, noise: float = 0.03) -> Runs:
    """Accuracies of 5 sizes and 6 numbers of samples whose odds follow an additive law."""
    runs = measured(KNOWN["additive"], seed, 0.0, 5, 6)
    odds = 0.1 + 2 * runs.size**-0.5 + 3e6 * runs.samples**-0.9
    odds = odds * np.exp(noise * np.random.default_rng(seed).standard_normal(len(odds)))
    return runs._replace(error=odds / (1 + odds))


def candidates(runs: Runs, forms: tuple[Form, ...] = OF_SIZES) -> list[Candidate]:
    links: tuple[Any, ...] = ("error", "odds", "log_score")
    return [Candidate(form, link_of(link, runs.error)) for form in forms for link in links]


def test_cuts_have_enough_points_below_and_predict_all_runs_above():
    runs = measured(KNOWN["additive"], 0, 0.0, 5, 6, seeds=2)
    for divides in (False, True):
        cuts = cuts_of(runs, 6, divides)
        assert len(cuts.points.error) == 30
        assert (cuts.fitted.sum(1) >= 8).all()
        assert not (cuts.tested & cuts.fitted).any()
        for fitted, tested, factor in zip(cuts.fitted, cuts.tested, cuts.factors(), strict=True):
            assert fitted.sum() + tested.sum() == 30  # one of two seeds is predicted
            assert (factor[tested] > 0).all()
    by_compute = cuts_of(runs, 6, False)
    smaller = by_compute.smaller()
    np.testing.assert_array_equal(smaller, np.triu(np.ones(smaller.shape, bool), 1))
    assert len(cuts.fitted) > len(by_compute.fitted)
    many = measured(KNOWN["power"], 0, 0.0, 1, 200)
    assert len(cuts_of(many, 2, False).fitted) == CUTS["compute"]
    assert not len(cuts_of(runs.where(np.arange(60) < 10), 6, True).fitted)


def test_checkpoints_are_predicted_by_other_runs():
    runs = measured(KNOWN["additive"], 0, 0.0, 5, 6)
    runs = runs._replace(run=np.char.add("r", runs.size.astype(int).astype(str)))
    cuts = cuts_of(runs, 5, True)
    assert len(cuts.fitted)
    for fitted, tested in zip(cuts.fitted, cuts.tested, strict=True):
        assert not {*np.asarray(cuts.runs.run)[tested]} & {*np.asarray(cuts.points.run)[fitted]}


def test_factors_are_the_largest_of_compute_size_and_samples():
    fitted = Runs(np.array([1.0, 10.0]), np.array([100.0, 10.0]), np.ones(2))
    size, samples = np.array([10.0, 20.0, 1.0, 20.0]), np.array([20.0, 1.0, 300.0, 100.0])
    by_all = np.exp(factors(size, samples, fitted, True))
    np.testing.assert_allclose(by_all, [2, 2, 3, 20])
    np.testing.assert_allclose(np.exp(factors(size, samples, fitted, False)), [2, 0.2, 3, 20])


def test_the_half_width_is_a_conformal_quantile_of_comparable_errors():
    rng = np.random.default_rng(0)
    off, factor = np.abs(rng.standard_normal(99)), np.full(99, np.log(2))
    points = np.full(99, 30)
    assert half_width(off, factor, points, 30, np.log(2)) == np.sort(off)[94]  # of 95
    assert half_width(off[:19], factor[:19], points[:19], 30, 0.0) == off[:19].max()
    assert half_width(off[:18], factor[:18], points[:18], 30, 0.0) is None
    assert half_width(off, factor, points, 30, np.log(2.1)) is None  # no cut reaches as far
    # Errors at other factors, and of fits to much fewer points, do not count if there are enough.
    wide = np.concatenate([off, 10 + off, 20 + off])
    far = np.concatenate([factor, factor + np.log(20), factor])
    few = np.concatenate([points, points, np.full(99, 9)])
    assert half_width(wide, far, few, 30, np.log(2)) == np.sort(off)[94]
    assert (half_width(wide, far, few, 30, np.log(40)) or 0.0) > 10
    # If the larger fits do not reach as far, the smaller ones count.
    assert (half_width(wide[99:], far[99:] + 3, few[99:], 30, np.log(30)) or 0.0) > 10


@pytest.mark.parametrize("seed", [0, 1])
def test_the_form_and_the_scale_with_the_best_predictions_are_chosen(seed: int):
    runs = scores(seed)
    validation: Any = validate(candidates(runs), runs, True)
    by_odds = Candidate("additive", link_of("odds", runs.error))
    assert by_odds in validation.chosen
    assert validation.offs[by_odds] < 0.5 * validation.offs[Candidate("additive", ERROR)]
    assert validation.offs[by_odds] < 0.5 * validation.offs[Candidate("power", ERROR)]
    near, *_ = validation.groups()
    assert near.off < 0.03
    assert near.checked
    assert near.inside > 0.85


def test_new_runs_are_inside_of_the_calibrated_interval():
    inside = []
    for seed in range(5):
        runs = scores(seed)
        known = runs.compute < 0.3 * runs.compute.max()
        laws = fit_laws(candidates(runs, ("additive",)), runs.where(known), True, draws=20)
        later = runs.where(~known)
        forecasts = laws.predict_all(later.size, later.samples)
        for forecast, error in zip(forecasts, later.error, strict=True):
            low, high = float(forecast.prediction.low), float(forecast.prediction.high)
            assert low <= forecast.prediction.error <= high
            if forecast.validated:
                inside.append(low <= error <= high)
    assert len(inside) >= 10
    assert np.mean(inside) > 0.9


def test_an_interval_is_never_narrower_than_the_laws_own():
    runs = measured(KNOWN["additive"], 0, 0.03, 5, 6)
    laws = fit_laws([Candidate("additive", ERROR)], runs, False, draws=20)
    alone = Laws(laws.fits, laws.candidates, False)
    for size, samples in ((300.0, 2e10), (100.0, 1e8)):
        (_, low, high), validated = laws.predict(size, samples)
        (_, own_low, own_high), unvalidated = alone.predict(size, samples)
        assert (validated, unvalidated) == (True, False)
        assert low <= own_low <= own_high <= high
    assert not laws.predict(3e5, 1e15).validated


@pytest.mark.parametrize("in_metric", [False, True])
def test_intervals_are_calibrated_on_the_scale_of_homogeneous_errors(in_metric: bool):
    """Errors of the same size in logits at all scores, or of the same size in points."""
    runs = scores()
    laws = fit_laws([Candidate("additive", link_of("odds", runs.error))], runs, True, draws=20)
    level = np.linspace(-3.0, 0.0, 200)
    noise = np.random.default_rng(0).standard_normal(200)
    error = from_margins(level, True)
    at = margins(error + 0.01 * noise, 1e-6) if in_metric else level + 0.1 * noise
    validation: Any = laws.validation
    zeros = np.zeros(200, int)
    validation = replace(
        validation,
        cut=zeros,
        points=zeros,
        run=zeros,
        factor=np.zeros(200),
        predicted=level,
        measured=np.asarray(at),
    )
    assert validation.in_metric == in_metric
    margin, half = np.asarray(margins(np.array([0.05, 0.5]), 1e-6)), np.array([0.1, 0.1])
    low, high = validation.around(margin, half)
    if in_metric:
        np.testing.assert_allclose([low, high], [[0.0, 0.4], [0.15, 0.6]], atol=1e-9)
    else:
        ends = np.stack([margins(low, 1e-6), margins(high, 1e-6)])
        np.testing.assert_allclose(ends, [margin - half, margin + half])


def test_an_interval_covers_the_rounding_of_the_table():
    runs = measured(KNOWN["power"], 0, 0.0, 1, 6)
    exact = fit_laws([Candidate("power", ERROR)], runs, False, draws=20)
    assert exact.resolution == 0
    rounded = runs._replace(error=np.round(runs.error, 3))
    laws = fit_laws([Candidate("power", ERROR)], rounded, False, draws=20)
    assert laws.resolution == 1e-3
    (_, low, high), _ = laws.predict(30.0, 1e11)
    (_, own_low, own_high) = laws.fit.predict(30.0, 1e11)
    np.testing.assert_allclose([low, high], [own_low - 5e-4, own_high + 5e-4])
    for values, step in (([0.652, 0.7], 1e-3), ([1e-200, 2.0], 0.0), ([3.0, 40.0], 1.0)):
        assert resolution(np.array(values)) == step


def test_few_runs_have_no_validation_and_the_default_form():
    runs = measured(KNOWN["additive"], 0, 0.01, 3, 3)
    assert default_form([runs]) == "additive"
    assert default_form([runs, runs.where(runs.size < 100)]) == "power"
    few = runs.where(np.arange(9) < 8)
    assert validate([Candidate("additive", ERROR)], few, False) is None or isinstance(
        cuts_of(few, 5, True), Cuts
    )
    laws = fit_laws([Candidate("power", ERROR)], runs.where(np.arange(9) < 3), False, draws=20)
    assert laws.validation is None
    assert not laws.predict(30.0, 1e9).validated


def test_margins_are_logits_of_scores_and_logs_of_errors():
    error = np.array([0.1, 0.5, 1.0])
    np.testing.assert_allclose(margins(error, None), np.log(error))
    np.testing.assert_allclose(margins(error, 0.01)[:2], [np.log(0.1 / 0.9), 0.0], atol=1e-12)
    assert margins(error, 0.01)[2] == pytest.approx(np.log(0.99 / 0.01))
    assert ENOUGH == 19
