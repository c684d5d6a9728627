"""The published fits, known laws recovered, and what a fit refuses."""

from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import curve_fit

from clip_jax.scaling import fit as fits
from clip_jax.scaling import table
from clip_jax.scaling.answers import PUBLISHED
from clip_jax.scaling.fit import fit
from clip_jax.scaling.laws import Runs, frontier, optimum, pareto
from tests.scaling.conftest import POINTS
from tests.scaling.known import KNOWN, NOISE, frontier_coverage, measured


def published(metric: str = "imagenet1k_acc1", data: str = "LAION*") -> Runs:
    rows = table.read(POINTS, metric, [f"upstream_dataset={data}"])
    return table.named(rows, metric, is_score=True).runs


def test_the_eight_published_fits_to_four_digits():
    """From the published points, by the paper's own procedure."""
    for metric, laws in PUBLISHED.items():
        for models, (alpha, beta) in laws.items():
            data, through = ("LAION*", "frontier") if models == "LAION" else ("CLIP-WIT", "all")
            law: Any = fit("power", published(metric, data), through, draws=10).law
            assert round(float(law.alpha), 4) == alpha
            assert float(f"{law.beta:.4g}") == beta


def test_the_published_predictions():
    first, second = (fit("power", published(), seed=1) for _ in range(2))
    at = np.array([190.97, 290.74, 532.92]), np.array([68e9, 34e9, 68e9])
    predicted = first.predict(*at)
    # g/14 at 34B was later measured at 78.5%: inside the interval.
    assert predicted.low[1] < 1 - 0.785 < predicted.high[1]
    # The same table and seed give the same intervals.
    assert first.interval("alpha") == second.interval("alpha")
    np.testing.assert_array_equal(predicted, second.predict(*at))
    # A single run is less certain than the law.
    everything: Any = fit("power", published(), "all")
    assert round(float(everything.law.alpha), 3) == -0.101
    for fitted in (first, everything):
        run, law = fitted.predict(*at), fitted.curve(*at)
        np.testing.assert_array_equal(run.error, law.error)
        ordered = np.array([run.low, law.low, law.error, law.high, run.high])
        assert (np.diff(ordered, axis=0) > 0).all()


def test_lines_steeper_than_any_float_are_not_drawn():
    """Three points leave one degree of freedom, of which some draws are extreme."""
    runs = Runs(np.array([1e3, 3e3, 1e4]), np.full(3, 1e12), np.exp([0.3, -0.5, 0.2]))
    drawn: Any = fit("power", runs, "all", draws=20_000)
    assert 19_000 < len(drawn.drawn.beta) < 20_000
    assert not np.isnan(fits.evaluate(drawn.drawn, np.array(1e3), np.array(1e12))).any()


def test_a_budget_is_divided_and_an_irreducible_error_that_runs_determine_is_stated():
    for form in ("saturating", "additive"):
        law = KNOWN[form]
        fitted: Any = fit(form, measured(law, 0, 0.005, 6, 6), "all", draws=60)
        assert fits.irreducible(fitted) == pytest.approx(float(law.irreducible), rel=0.03)
    sizes = np.geomspace(3, 300, 12)
    choice = fits.allocate(fitted, 1e9, sizes)
    assert choice.best == np.argmin(law(sizes, 1e9 / sizes))
    assert choice.samples == 1e9 / sizes[choice.best]
    assert choice.share.sum() == pytest.approx(1)
    assert choice.share[choice.best] > 0.5
    # A larger budget buys a larger model.
    assert fits.allocate(fitted, 1e11, sizes).best > choice.best


def test_repeated_samples_and_large_batches_count_less():
    law = KNOWN["repeated"]
    # Seen four times, samples are nearly as good as new; seen a thousand times, worth 16 epochs.
    assert 1 < law(100.0, 4e7, 1e7) / law(100.0, 4e7) < 1.05
    assert law(100.0, 1e10, 1e7) == pytest.approx(law(100.0, 16e7), rel=0.02)
    assert law(100.0, 1e6, 1e9) == law(100.0, 1e6)  # none of them twice
    batched = KNOWN["batched"]
    assert batched(100.0, 1e9, 3e4) == pytest.approx(batched(100.0, 5e8))  # half of them count


def test_compute_is_divided_best():
    law, compute = KNOWN["additive"], np.geomspace(1e8, 1e12, 5)
    division = optimum(law, compute, (1e-3, 1e6))
    np.testing.assert_allclose(division.size * division.samples, compute)
    for nearby in (0.9, 1.1):
        error = law(division.size * nearby, division.samples / nearby)
        assert (error > division.error).all()
    slope = np.diff(np.log(division.size)) / np.diff(np.log(compute))
    np.testing.assert_allclose(slope, 0.3 / 0.8)
    assert optimum(law, compute, (1.0, 2.0)).size.max() == 2.0
    _, low, high = fits.best(fit("additive", measured(law), "all"), compute, (1e-3, 1e6))["error"]
    assert ((low < division.error) & (division.error < high)).all()


def test_the_frontier_is_the_least_error_of_each_bin():
    compute = np.array([1.0, 2.0, 30.0, 30.0, 1000.0])
    error = np.array([0.9, 0.8, 0.5, 0.6, 0.1])
    centre, least = frontier(compute, error, np.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(centre, 10 ** np.array([0.5, 1.5, 2.5, 3.5]))
    np.testing.assert_array_equal(least, [0.8, 0.5, np.inf, 0.1])
    runs = Runs(compute, np.ones(5), error)
    np.testing.assert_array_equal(pareto(runs), [True, True, True, False, True])


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
        fit(form, runs._replace(**changes), through)


def test_a_straight_lines_intervals_are_the_textbooks():
    """Student's t: of the slope, the line's height and a new run, beyond the data as well."""
    rng, samples = np.random.default_rng(0), np.geomspace(1e9, 1e13, 12)
    error = 5 * samples**-0.11 * np.exp(NOISE * rng.standard_normal(12))
    fitted: Any = fit("power", Runs(np.ones(12), samples, error), "all", draws=40_000)
    x, y, reach = np.log(samples), np.log(error), stats.t.ppf([0.025, 0.975], 10)
    line: Any = stats.linregress(x, y)
    alpha = line.slope + reach * line.stderr
    np.testing.assert_allclose(fitted.interval("alpha"), alpha)
    beta = np.exp(line.intercept + reach * line.intercept_stderr)
    np.testing.assert_allclose(fitted.interval("beta"), beta)
    drawn = np.array(fits.middle(fitted.drawn.alpha))
    np.testing.assert_allclose(drawn, alpha, atol=0.03 * (alpha[1] - alpha[0]))
    noise = np.square(y - line.slope * x - line.intercept).sum() / 10
    height = noise * (1 / 12 + (np.log(1e14) - x.mean()) ** 2 / np.square(x - x.mean()).sum())
    for answer, variance in ((fitted.curve, height), (fitted.predict, height + noise)):
        _, low, high = answer(np.array(1.0), np.array(1e14))
        np.testing.assert_allclose(np.log(high / low), 2 * reach[1] * np.sqrt(variance))


@pytest.mark.parametrize("form", ["saturating", "additive", "repeated", "batched"])
def test_estimates_and_intervals_are_those_of_scipy(form: fits.Form):
    """Weighted least squares; while noise is small, draws have the covariance of its Jacobian."""
    law, runs = KNOWN[form], measured(KNOWN[form], noise=0.01)
    fitted, truth = fit(form, runs, "all", draws=80), np.array(law)

    def error(at: Runs, *relative: float) -> np.ndarray:
        return np.asarray(at.under(type(law)(*(truth * relative))))

    start = np.ones(len(truth))
    expected, covariance = curve_fit(
        lambda _, *relative: error(runs, *relative), None, runs.error, start, sigma=runs.error
    )
    np.testing.assert_allclose(np.array(fitted.law), truth * expected, rtol=5e-3)
    spread = np.sqrt(np.diag(covariance)) / expected
    np.testing.assert_allclose(np.std(np.log(np.array(fitted.drawn)), axis=1), spread, rtol=0.3)
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
