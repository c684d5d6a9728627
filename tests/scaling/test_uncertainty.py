"""Known laws recovered with their intervals, where they cross, and what a fit refuses."""

from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import curve_fit

from clip_jax.scaling.laws import Law, Runs
from clip_jax.scaling.run_table import read
from clip_jax.scaling.uncertainty import Form, crossing, fit_law, middle, paired, ratios
from tests.scaling.conftest import POINTS
from tests.scaling.known import (
    KNOWN,
    NOISE,
    OTHERS,
    families,
    frontier_coverage,
    measured,
    true_crossing,
)


def published() -> Runs:
    table = read(POINTS).select("imagenet1k_acc1", ["upstream_dataset=LAION*"])
    return table.runs("imagenet1k_acc1", is_score=True)


def test_the_published_predictions():
    first, second = (fit_law("power", published(), seed=1) for _ in range(2))
    at = np.array([190.97, 290.74, 532.92]), np.array([68e9, 34e9, 68e9])
    predicted = first.predict(*at)
    # g/14 at 34B was later measured at 78.5%: inside the interval.
    assert predicted.low[1] < 1 - 0.785 < predicted.high[1]
    # The same table and seed give the same intervals.
    assert first.interval("alpha") == second.interval("alpha")
    np.testing.assert_array_equal(predicted, second.predict(*at))
    # A single run is less certain than the law.
    everything: Any = fit_law("power", published(), "all")
    assert round(float(everything.law.alpha), 3) == -0.101
    for fitted in (first, everything):
        run, law = fitted.predict(*at), fitted.curve(*at)
        np.testing.assert_array_equal(run.error, law.error)
        ordered = np.array([run.low, law.low, law.error, law.high, run.high])
        assert (np.diff(ordered, axis=0) > 0).all()


def test_lines_steeper_than_any_float_are_not_drawn():
    """Three points leave one degree of freedom, of which some draws are extreme."""
    runs = Runs(np.array([1e3, 3e3, 1e4]), np.full(3, 1e12), np.exp([0.3, -0.5, 0.2]))
    drawn: Any = fit_law("power", runs, "all", draws=20_000)
    assert 19_000 < len(drawn.drawn.beta) < 20_000
    assert not np.isnan(drawn.draws(np.array(1e3), np.array(1e12))).any()


@pytest.mark.parametrize("form", ["saturating", "additive"])
def test_an_irreducible_error_that_runs_determine_is_stated(form: Form):
    law: Any = KNOWN[form]
    fitted = fit_law(form, measured(law, 0, 0.005, 6, 6), "all", draws=60)
    assert fitted.irreducible == pytest.approx(float(law.irreducible), rel=0.03)


@pytest.mark.parametrize(
    ("form", "through", "changes", "message"),
    [
        ("additive", "frontier", {}, "needs sizes and samples"),
        ("saturating", "all", {}, "3 points .* 4 parameters"),
        ("power", "frontier", {"error": np.array([0.5, 0.1, 0.0])}, "positive"),
        ("repeated", "all", {}, "distinct samples of each run, more than 0"),
        ("batched", "all", {"third": np.zeros(3)}, "batch of each run, more than 0"),
    ],
)
def test_what_cannot_be_fitted_is_refused(form, through, changes, message):
    runs = Runs(np.arange(1.0, 4), np.ones(3), np.full(3, 0.5))
    with pytest.raises(ValueError, match=message):
        fit_law(form, runs._replace(**changes), through)


def test_a_straight_lines_intervals_are_the_textbooks():
    """Student's t: of the slope, the line's height and a new run, beyond the data as well."""
    rng, samples = np.random.default_rng(0), np.geomspace(1e9, 1e13, 12)
    error = 5 * samples**-0.11 * np.exp(NOISE * rng.standard_normal(12))
    fitted: Any = fit_law("power", Runs(np.ones(12), samples, error), "all", draws=40_000)
    x, y, reach = np.log(samples), np.log(error), stats.t.ppf([0.025, 0.975], 10)
    line: Any = stats.linregress(x, y)
    alpha = line.slope + reach * line.stderr
    np.testing.assert_allclose(fitted.interval("alpha"), alpha)
    beta = np.exp(line.intercept + reach * line.intercept_stderr)
    np.testing.assert_allclose(fitted.interval("beta"), beta)
    drawn = np.array(middle(fitted.drawn.alpha))
    np.testing.assert_allclose(drawn, alpha, atol=0.03 * (alpha[1] - alpha[0]))
    noise = np.square(y - line.slope * x - line.intercept).sum() / 10
    height = noise * (1 / 12 + (np.log(1e14) - x.mean()) ** 2 / np.square(x - x.mean()).sum())
    for answer, variance in ((fitted.curve, height), (fitted.predict, height + noise)):
        _, low, high = answer(np.array(1.0), np.array(1e14))
        np.testing.assert_allclose(np.log(high / low), 2 * reach[1] * np.sqrt(variance))


def numbers(law: Law) -> np.ndarray:
    return np.array([*law.parameters.values()])


@pytest.mark.parametrize("form", ["saturating", "additive", "repeated", "batched"])
def test_estimates_and_intervals_are_those_of_scipy(form: Form):
    """Weighted least squares; while noise is small, draws have the covariance of its Jacobian."""
    law, runs = KNOWN[form], measured(KNOWN[form], noise=0.01)
    fitted = fit_law(form, runs, "all", draws=80)
    truth, estimates, drawn = (numbers(x) for x in (law, fitted.law, fitted.drawn))

    def error(at: Runs, *relative: float) -> np.ndarray:
        return np.asarray(at.under(type(law)(*(truth * relative))))

    start = np.ones(len(truth))
    expected, covariance = curve_fit(
        lambda _, *relative: error(runs, *relative), None, runs.error, start, sigma=runs.error
    )
    np.testing.assert_allclose(estimates, truth * expected, rtol=5e-3)
    spread = np.sqrt(np.diag(covariance)) / expected
    np.testing.assert_allclose(np.std(np.log(drawn), axis=1), spread, rtol=0.3)
    # The law and one new run, at ten times the largest compute.
    ahead = Runs(*(np.array([x]) for x in (300.0, 1e11, 1.0, 1e5)))
    point = error(ahead, *expected)
    slopes = [error(ahead, *(expected + 1e-4 * one)) - point for one in np.eye(len(truth))]
    slope = np.ravel(slopes) / 1e-4 / point
    variance = slope @ covariance @ slope
    for answer, scatter in ((fitted.curve, 0), (fitted.predict, 1e-4)):
        _, low, high = answer(ahead.size, ahead.samples, ahead.third)
        wanted = 2 * 1.96 * np.sqrt(variance + scatter)
        np.testing.assert_allclose(np.log(high / low), wanted, rtol=0.35)


def test_the_frontiers_interval_holds_the_truth_more_often_than_not():
    assert frontier_coverage(tables=20, draws=40) >= 0.8


@pytest.mark.parametrize("form", OTHERS)
def test_a_crossing_is_estimated_with_its_interval(form: Form):
    first, second = families(form, 0, draws=60)
    estimate: Any = crossing(first, second)
    truth = true_crossing(form)
    assert estimate.better == 1
    for crosses_at in (truth, estimate.compute):
        assert estimate.low < crosses_at < estimate.high
    assert estimate.share > 0.9
    back = crossing(second, first)
    assert back.better == 0
    np.testing.assert_allclose(np.array(back[1:], float), np.array(estimate[1:], float))


def test_laws_that_keep_their_order_do_not_cross():
    runs = measured(KNOWN["power"], 0, counts=5)
    worse = runs._replace(error=1.3 * measured(KNOWN["power"], 1, counts=5).error)
    first, second = (fit_law("power", x, "all", seed=i) for i, x in enumerate((runs, worse)))
    below, above = ratios(first, second, np.array([1e8, 1e12]))
    assert below.low < 1.3 < below.high
    assert above.share == 0
    cross = crossing(first, second)
    # Their slopes differ by the noise alone: if they are said to cross, then not surely.
    assert (cross.better, cross.low) == (0, 0)
    assert cross.share < 0.9


def test_runs_alike_in_all_else_are_compared_one_by_one():
    pairs = np.random.default_rng(0).uniform(0.2, 0.8, (12, 2))
    estimate: Any = paired(pairs)
    t = stats.ttest_1samp(np.log(pairs[:, 1] / pairs[:, 0]), 0).confidence_interval()
    np.testing.assert_allclose(estimate, (12, np.exp(np.mean(t)), *np.exp(t)))
    assert paired(pairs[:1]) is None
