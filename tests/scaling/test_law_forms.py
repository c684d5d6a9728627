"""A law with an interaction, and one with a break."""

from typing import Any

import numpy as np
import pytest

from clip_jax.scaling.law_forms import FORMS, Broken, Interaction
from clip_jax.scaling.laws import Runs
from clip_jax.scaling.uncertainty import fit_law
from tests.scaling.known import KNOWN, measured


def test_an_interaction_is_recovered_and_divides_compute():
    law = Interaction(0.5, 0.3, 1.0, 40.0, 0.1, 100.0)
    runs = measured(KNOWN["additive"], 0, 0.0, 6, 6)
    runs = runs._replace(error=np.asarray(runs.under(law)))
    fitted: Any = fit_law("interaction", runs, draws=20)
    for name, value in law.parameters.items():
        assert fitted.law.parameters[name] == pytest.approx(value, rel=0.05)
    best = law.optimum(np.array([1e9, 1e12]), (0.1, 1e4))
    for nearby in (0.8, 1.25):
        assert (law(best.size * nearby, best.samples / nearby) > best.error).all()


def test_a_break_changes_the_exponent():
    law = Broken(0.05, 0.3, 1e9, 2.0, 0.01)
    compute = np.geomspace(1e3, 1e15, 121)
    slope = np.diff(np.log(law(1.0, compute) - 0.01)) / np.diff(np.log(compute))
    assert slope[0] == pytest.approx(-0.05, abs=1e-3)
    assert slope[-1] == pytest.approx(-0.3, abs=1e-3)
    inside = Runs(np.ones(25), np.geomspace(1e6, 1e12, 25), np.ones(25))
    noise = np.exp(0.002 * np.random.default_rng(0).standard_normal(25))
    runs = inside._replace(error=np.asarray(inside.under(law)) * noise)
    broken, line = (fit_law(form, runs, draws=20) for form in ("broken", "power"))
    assert np.abs(broken.residuals).max() < 0.01
    assert np.abs(line.residuals).max() > 0.1
    ahead = float(broken.curve(1.0, 1e13).error)
    assert ahead == pytest.approx(float(law(1.0, 1e13)), rel=0.1)


def test_every_form_names_what_its_parameters_need():
    for kind in FORMS.values():
        assert {*kind.NEEDS} == {*kind.names()}
