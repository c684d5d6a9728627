"""Families side by side: where their laws cross, and the interval of that."""

import numpy as np
import pytest

from clip_jax.scaling.compare import Family, crossing, paired, ratios, side_by_side
from clip_jax.scaling.fit import Form, fit
from tests.scaling.known import KNOWN, OTHERS, families, measured, true_crossing


@pytest.mark.parametrize("form", OTHERS)
def test_a_crossing_is_estimated_with_its_interval(form: Form):
    first, second = families(form, 0, draws=60)
    estimate, truth = crossing(first, second), true_crossing(form)
    assert estimate.better == 1
    assert estimate.compute is not None
    assert estimate.low < truth < estimate.high
    assert estimate.low < estimate.compute < estimate.high
    assert estimate.share > 0.9
    back = crossing(second, first)
    assert back.better == 0
    np.testing.assert_allclose(np.array(back[1:], float), np.array(estimate[1:], float))


def test_laws_that_keep_their_order_do_not_cross():
    runs = measured(KNOWN["power"], 0, counts=5)
    worse = runs._replace(error=1.3 * measured(KNOWN["power"], 1, counts=5).error)
    first, second = (Family(x, fit("power", x, "all", seed=i)) for i, x in enumerate((runs, worse)))
    below, above = ratios(first, second, np.array([1e8, 1e12]))
    assert below.low < 1.3 < below.high
    assert above.share == 0
    pair = side_by_side({"a": first, "b": second}, {"a": {}, "b": {}})[0]
    # Their slopes differ by the noise alone: if they are said to cross, then not surely.
    assert pair["crossing"]["better"] == 0
    assert pair["crossing"]["low"] == 0
    assert pair["crossing"]["share"] < 0.9
    assert pair["paired"] is None


def test_runs_alike_in_all_else_are_compared_one_by_one():
    rng = np.random.default_rng(0)
    one = rng.uniform(0.2, 0.8, 12)
    estimate = paired(np.stack([one, one * 1.02 * np.exp(0.01 * rng.standard_normal(12))], axis=1))
    assert estimate
    assert estimate.pairs == 12
    assert estimate.low < 1.02 < estimate.high
    assert estimate.high - estimate.low < 0.02
