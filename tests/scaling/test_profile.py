"""Profile likelihood intervals: against Student's t and scipy, and what they do not state."""

from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import brentq, least_squares

from clip_jax.scaling.laws import Runs
from clip_jax.scaling.profile import region
from clip_jax.scaling.uncertainty import Fit, Form, fit_law
from tests.scaling.known import KNOWN, law, measured


def test_intervals_of_a_linear_law_are_students():
    """With two sizes and two numbers of samples, only coefficients are free."""
    axes = np.meshgrid([3.0, 300.0], [1e6, 1e9], np.geomspace(10, 1e5, 4))
    size, samples, batch = (x.ravel() for x in axes)
    truth = law("batched", 3.0, 3.0, 10.0, 4e17, 0.3, 1.0, 5.0)
    runs = Runs(size, samples, np.asarray(truth(size, samples, batch)), batch)
    scatter = np.random.default_rng(0).standard_normal(16)
    fitted = fit_law("batched", runs._replace(error=runs.error * np.exp(0.02 * scatter)))
    names, law_fitted = fitted.law.COEFFICIENTS, fitted.law
    around = np.asarray(runs.under(law_fitted))
    terms = np.stack(np.broadcast_arrays(*law_fitted.terms(size, samples, batch)), axis=-1)
    unit = np.array([float(law_fitted.parameters[name]) for name in names])
    scaled = terms * unit / around[:, None]
    covariance = np.linalg.inv((scaled * fitted.weights[:, None]).T @ scaled)
    reach = stats.t.ppf(0.975, fitted.freedom) * fitted.noise
    for name, one in zip(names, np.eye(5), strict=True):
        half = reach * np.sqrt(one @ covariance @ one)
        wanted = (1 + half * np.array([-1, 1])) * law_fitted.parameters[name]
        np.testing.assert_allclose(fitted.interval(name)[:2], wanted, rtol=1e-5)
        assert not fitted.interval(name).open
    direction = np.array([float(x) for x in law_fitted.terms(3.0, 1e9, 1e3)]) * unit
    half = reach * np.sqrt(direction @ covariance @ direction)
    error, low, high = fitted.curve(3.0, 1e9, 1e3)
    np.testing.assert_allclose([low, high], error + half * np.array([-1, 1]), rtol=1e-5)


@pytest.mark.parametrize("form", ["saturating", "additive"])
def test_intervals_are_those_of_scipys_profile(form: Form):
    """Fix a parameter or a prediction, refit the others, find where the squares are too many."""
    runs = measured(KNOWN[form], 3, 0.005, 5, 5)
    fitted = fit_law(form, runs)
    runs = fitted.fitted
    kind: Any = type(fitted.law)
    names = fitted.law.names()
    best = np.log([float(x) for x in fitted.law.parameters.values()])
    ahead, last = (300.0, 1e11), len(names) - 1

    def rest(values: np.ndarray, at: int, value: float, is_law: bool) -> np.ndarray:
        """Residuals of a law whose parameter `at` is fixed, or the irreducible error by the law."""
        values = np.exp(np.insert(values, at, np.log(value)))
        if is_law:
            values[last] = value - kind(*values[:-1], 0.0)(*ahead)
        error = np.maximum(runs.under(kind(*values)), 1e-9)
        return np.sqrt(fitted.weights) * np.log(runs.error / error)

    limit = (stats.t.ppf(0.975, fitted.freedom) * fitted.noise) ** 2
    least = float((fitted.weights * fitted.residuals**2).sum())

    def ends(at: int, value: float, interval: Any, is_law: bool = False) -> list[float]:
        def above(fixed: float) -> float:
            solved = least_squares(
                rest,
                np.delete(best, at),
                args=(at, fixed, is_law),
                x_scale="jac",
                xtol=1e-12,
                ftol=1e-12,
            )
            return 2 * float(solved.cost) - least - limit

        low, high = (value + 2 * (end - value) for end in interval[:2])
        return [brentq(above, value, end, xtol=1e-6 * value) for end in (max(low, value / 9), high)]

    for at, name in enumerate(names):
        interval, value = fitted.interval(name), float(np.exp(best[at]))
        if name in ("size_alpha", "alpha", "irreducible"):
            low, high = ends(at, value, interval)
            assert interval.low == pytest.approx(low, abs=0.04 * (high - low))
            assert interval.high == pytest.approx(high, abs=0.04 * (high - low))
    error, *band = map(float, fitted.curve(*ahead))
    low, high = ends(last, error, band, is_law=True)
    np.testing.assert_allclose(band, [low, high], atol=0.04 * (high - low))


def test_intervals_that_reach_a_bound_are_open():
    """A power law has no irreducible error; errors that do not fall with size have no exponent."""
    fitted = fit_law("additive", measured(law("additive", 0.3, 0.2, 0.5, 5.0, 0.0), 0, 0.03))
    interval = fitted.interval("irreducible")
    assert (interval.low, interval.open) == (0.0, True)
    assert fitted.lacking("irreducible")
    wider = "a wider range of model sizes and numbers of samples, or less noise"
    assert fitted.lacking("irreducible") == wider
    _, low, high = map(float, fitted.curve(1e9, 1e18))  # no error is negative, however far
    assert 0 < low < 0.01 < high
    runs = measured(law("additive", 0.5, 0.3, 1e-9, 40.0, 0.1), 0, 0.01)
    fitted = fit_law("additive", runs)
    for name in ("size_alpha", "size_scale"):
        assert fitted.interval(name).open
        assert fitted.lacking(name) == "a wider range of model sizes, or less noise"
    assert fitted.lacking("samples_alpha") == ""
    # A narrow range, and noise: neither exponent is determined, and intervals hold the estimates.
    runs = measured(KNOWN["saturating"], 0, 0.1, 3, 3)
    narrow = fit_law("saturating", runs._replace(samples=1e9 * (runs.samples / 1e9) ** 0.05))
    for name, value in narrow.law.parameters.items():
        low, high, is_open = narrow.interval(name)
        assert low <= value <= high
        assert is_open


@pytest.mark.parametrize("sizes", [1, 2])
@pytest.mark.parametrize("form", ["additive", "repeated", "batched"])
def test_one_or_two_sizes_say_nothing_about_size(form: Form, sizes: int):
    fitted: Any = fit_law(form, measured(KNOWN[form], 0, 0.01, sizes, 6))
    for name in ("size_alpha", "size_scale", "irreducible"):
        assert fitted.lacking(name) == "runs of at least three model sizes"
    assert fitted.lacking("irreducible")
    assert fitted.lacking("samples_alpha") == ""
    third = {"additive": None, "repeated": 1e7, "batched": 1e4}[form]
    lacking = "runs of at least three model sizes"
    assert fitted.unknown(87.0, 1e9, third) == lacking
    size = float(fitted.runs.size[0])
    for samples in (1e8, 1e11):  # of a size in the table, other numbers of samples
        assert fitted.unknown(size, samples, third) == ""
        _, low, high = fitted.curve(size, samples, third)
        assert low < KNOWN[form](size, samples, third) < high


def test_few_values_of_other_quantities_are_named():
    few = fit_law("additive", measured(KNOWN["additive"], 0, 0.01, 4, 2))
    assert few.lacking("samples_scale") == "runs of at least three numbers of samples"
    assert few.unknown(30.0, 1e9) == "runs of at least three numbers of samples"
    runs = measured(KNOWN["batched"], 0, 0.01)
    few = fit_law("batched", runs.where(np.isin(runs.third, (1e3, 1e4))))
    lacking = "runs of at least three batch sizes or numbers of distinct samples"
    assert (
        few.lacking("negatives") == few.lacking("steps") == few.unknown(30.0, 1e9, 3e3) == lacking
    )
    assert few.unknown(30.0, 1e9, 1e4) == ""
    line = fit_law("power", measured(KNOWN["power"], 0, 0.01, 1, 6))
    assert (line.lacking("alpha"), line.unknown(87.0, 1e11)) == ("", "")


def test_a_region_holds_its_own_law_however_small():
    runs = measured(KNOWN["additive"], 0, 0.0)
    fitted: Fit = fit_law("additive", runs)
    least = float((fitted.residuals**2).sum())
    point = region(fitted.law, runs, np.ones(16), least * (1 + 1e-9))
    low, high = point.law(runs)
    np.testing.assert_allclose(low, runs.under(fitted.law), rtol=1e-3)
    np.testing.assert_allclose(high, runs.under(fitted.law), rtol=1e-3)
