"""Families side by side: where their laws cross, and the interval of that."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from clip_jax.scaling.compare import Family, crossing, paired, ratios, side_by_side
from clip_jax.scaling.fit import Form, fit
from tests.scaling.known import KNOWN, OTHERS, families, measured, true_crossing


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
    first, second = (Family(x, fit("power", x, "all", seed=i)) for i, x in enumerate((runs, worse)))
    below, above = ratios(first, second, np.array([1e8, 1e12]))
    assert below.low < 1.3 < below.high
    assert above.share == 0
    pair = side_by_side({"a": first, "b": second}, {"a": {}, "b": {}})[0]
    # Their slopes differ by the noise alone: if they are said to cross, then not surely.
    assert (pair["crossing"]["better"], pair["crossing"]["low"], pair["paired"]) == (0, 0, None)
    assert pair["crossing"]["share"] < 0.9


def test_runs_alike_in_all_else_are_compared_one_by_one():
    pairs = np.random.default_rng(0).uniform(0.2, 0.8, (12, 2))
    estimate: Any = paired(pairs)
    t = stats.ttest_1samp(np.log(pairs[:, 1] / pairs[:, 0]), 0).confidence_interval()
    np.testing.assert_allclose(estimate, (12, np.exp(np.mean(t)), *np.exp(t)))
