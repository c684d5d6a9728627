"""Scales of the error: inverses, slopes, chance, and laws on them."""

import numpy as np
import pytest

from clip_jax.scaling.laws import Runs
from clip_jax.scaling.links import ERROR, Link, from_margins, link_of, margins, starts_at_chance
from clip_jax.scaling.uncertainty import fit_law


@pytest.mark.parametrize("guesses", [1.0, 0.9, 6.93])
@pytest.mark.parametrize("name", ["error", "odds", "log_score"])
def test_a_link_rises_and_has_an_inverse_and_a_slope(name, guesses: float):
    link = Link(name, guesses)
    error = np.linspace(0.01, 0.98, 30) * guesses
    value = np.asarray(link.of(error))
    assert (np.diff(value) > 0).all()
    np.testing.assert_allclose(link.error(value), error)
    step = 1e-6
    slope = (np.log(link.of(error + step)) - np.log(link.of(error - step))) / (2 * step)
    np.testing.assert_allclose(link.slope(error), slope, rtol=1e-6)
    assert link.error(1e300) <= (np.inf if name == "error" else guesses)


def test_scores_at_chance_count_as_half_of_the_smallest_above_it():
    link = link_of("odds", np.array([0.5, 0.86, 0.9, 0.95]), 0.9)
    assert link.of(np.array([0.95])) == link.of(np.array([0.9])) == pytest.approx(0.88 / 0.02)
    assert link_of("error", np.array([0.5])) == ERROR
    assert link_of("odds", np.array([1.0])).least > 0


@pytest.mark.parametrize(
    ("highest", "guesses", "near"),
    [(0.8, 1.0, True), (0.7, 1.0, False), (0.7, 0.9, True), (6.0, 6.93, True), (5.0, 6.93, False)],
)
def test_a_table_starts_at_chance_if_its_highest_error_is_near(highest, guesses, near):
    assert starts_at_chance(np.array([0.2, highest]), guesses) == near


def test_margins_have_an_inverse():
    error = np.linspace(0.01, 0.99, 9)
    for least in (None, 1e-3):
        np.testing.assert_allclose(from_margins(margins(error, least), least is not None), error)


def test_a_saturating_law_of_the_odds_is_a_sigmoid_with_chance_and_ceiling():
    compute = np.geomspace(1e6, 1e13, 40)
    score = 0.1 + 0.8 / (1 + (compute / 1e9) ** -0.6)
    runs = Runs(np.ones(40), compute, 1 - score)
    by_chance = fit_law("saturating", runs, draws=20, link=Link("odds", 0.9))
    np.testing.assert_allclose(by_chance.errors(runs), runs.error, atol=1e-3)
    assert by_chance.law.parameters["alpha"] == pytest.approx(0.6, rel=0.02)
    # Without the number of classes the offset describes the level of the smallest runs.
    fitted = fit_law("saturating", runs, draws=20, link=Link("odds"))
    np.testing.assert_allclose(fitted.errors(runs), runs.error, atol=0.02)
    low, high = fitted.curve(1.0, 1e14)[1:]
    assert 0.05 < low <= high < 0.2
    plain = fit_law("power", runs, draws=20)
    assert np.abs(plain.errors(runs) - runs.error).max() > 0.2
