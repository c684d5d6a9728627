"""Comparisons of laws: crossings inside and outside of the data, verdicts, matching runs."""

import json
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from clip_jax.scaling import compare
from clip_jax.scaling.compare import Comparison, FamilyPair, Paired, describe, paired
from clip_jax.scaling.laws import Law, Runs
from clip_jax.scaling.run_table import RunTable
from clip_jax.scaling.uncertainty import Form, fit_law
from tests.scaling.known import KNOWN, crossing_of, law, measured

POWER = KNOWN["power"]  # between 3e6 and 3e12 GMACs × pairs
INSIDE: dict[Form, Law] = {  # laws that cross the known ones once, inside the data
    "power": law("power", -0.16, 5.0 * 1e10**0.05),
    "saturating": law("saturating", 0.4, 1e8, 900.0, 0.2 - 500 * (1e10 + 1e8) ** -0.4),
    "additive": law("additive", 0.6, 0.4, 1.1, 280.0, 0.07),
}


def runs_of(law: Law, seed: int, noise: float = 0.01) -> Runs:
    return measured(law, seed, noise, counts=6)


def compared(laws: tuple[Law, Law], forms: tuple[Form, Form], noise: float = 0.01) -> Comparison:
    made = (runs_of(x, seed, noise) for seed, x in enumerate(laws))
    first, second = (
        fit_law(form, runs, draws=200, seed=i)
        for i, (form, runs) in enumerate(zip(forms, made, strict=True))
    )
    return compare.compare(first, second)


def pair_of(result: Comparison, alike: Paired | None = None) -> FamilyPair:
    return FamilyPair(families=("A", "B"), comparison=result, paired=alike)


def hold_their_estimates(result: Comparison) -> bool:
    return all(x.low < x.compute < x.high for x in result.crossings)


@pytest.mark.parametrize("form", list(INSIDE))
def test_one_crossing_inside_the_data(form: Form):
    result = compared((KNOWN[form], INSIDE[form]), (form, form))
    truth = crossing_of(KNOWN[form], INSIDE[form], 1e7, 1e13)
    (crossing,) = (x for x in result.crossings if x.inside)
    assert crossing.low < truth < crossing.high
    assert hold_their_estimates(result)
    assert crossing.better == 1
    assert result.share > 0.9
    # The first family is better below, the second above, and neither is at the crossing.
    assert [x.better for x in result.segments] == [0, None, 1]
    (below, around, above) = result.segments
    assert (below.high, around.high) == (around.low, above.low)
    assert around.low <= crossing.compute <= around.high
    assert (crossing.low, crossing.high) == pytest.approx((around.low, around.high), rel=0.1)
    assert [x.share for x in result.ratios] == [0, 1]
    assert [x.low < x.ratio < x.high for x in result.ratios] == [True, True]


def test_families_in_the_other_order_have_the_same_crossing():
    laws: Any = KNOWN["power"], INSIDE["power"]
    fits = [fit_law("power", runs_of(x, seed), draws=100, seed=seed) for seed, x in enumerate(laws)]
    forward, back = compare.compare(fits[0], fits[1]), compare.compare(fits[1], fits[0])
    assert [x.better for x in back.segments] == [1, None, 0]
    (first,), (second,) = forward.crossings, back.crossings
    assert second.better == 0
    assert second.compute == pytest.approx(first.compute)
    assert (second.low, second.high) == pytest.approx((first.low, first.high))


def twice() -> tuple[Law, Law]:
    """A law that bends, and a line through two of its points: it is above the line outside."""
    bent: Any = law("saturating", 0.2, 1e4, 20.0, 0.2)
    low, high = 3e7, 3e11
    alpha = float(np.log(bent(1.0, high) / bent(1.0, low)) / np.log(high / low))
    return bent, law("power", alpha, float(bent(1.0, low) * low**-alpha))


def test_two_crossings_inside_the_data():
    laws = twice()
    result = compared(laws, ("saturating", "power"), noise=0.005)
    inside = [x for x in result.crossings if x.inside]
    truths = crossing_of(*laws, 1e7, 1e9), crossing_of(*laws, 1e10, 1e12)
    assert truths == pytest.approx((3e7, 3e11), rel=1e-3)
    assert len(inside) == 2
    for crossing, truth in zip(inside, truths, strict=True):
        assert crossing.low < truth < crossing.high
    assert hold_their_estimates(result)
    assert inside[0].better != inside[1].better
    assert [x.better for x in result.segments] == [1, None, 0, None, 1]
    text = "\n".join(describe(pair_of(result)))
    assert text.count("the laws cross at") == len(result.crossings)


def test_no_crossing():
    worse = law("power", -0.11, 6.0)
    result = compared((POWER, worse), ("power", "power"), noise=0.03)
    assert [x.better for x in result.segments] == [0]
    assert (result.segments[0].low, result.segments[0].high) == pytest.approx((3e6, 3e12))
    assert not [x for x in result.crossings if x.inside]
    assert hold_their_estimates(result)
    assert result.share == 0
    for at in result.ratios:
        assert at.low < 1.2 < at.high
        assert at.share == 0
    text = "\n".join(describe(pair_of(result)))
    assert "from 3e+06 to 3e+12: A is better" in text
    assert "the laws do not cross in this range; in 0% of draws they do" in text


def test_a_crossing_outside_the_data_is_marked_as_extrapolated():
    """The laws cross at 1e13, beyond the data, and once at 1e15, beyond the search."""
    near = law("power", -0.13, 5.0 * 1e13**0.02)
    result = compared((POWER, near), ("power", "power"))
    (crossing,) = result.crossings
    assert not crossing.inside
    assert crossing.low < 1e13 < crossing.high
    assert result.segments[0].better == 0
    assert 1 not in [x.better for x in result.segments]
    text = "\n".join(describe(pair_of(result)))
    assert "above it B is better; EXTRAPOLATED, not all have runs around it" in text
    assert "the laws do not cross in this range" in text
    far = law("power", -0.13, 5.0 * 1e15**0.02)
    assert compared((POWER, far), ("power", "power"), noise=0.001).crossings == []


def test_laws_that_cannot_be_told_apart_are_not():
    """An interval that is open on both sides is null in JSON, and said to be not determined."""
    result = compared((POWER, POWER), ("power", "power"), noise=0.1)
    assert [x.better for x in result.segments] == [None]
    pair = pair_of(result)
    values = json.loads(json.dumps(pair.to_json(), allow_nan=False))
    for crossing, x in zip(values["crossings"], result.crossings, strict=True):
        assert (crossing["low"] is None) == (x.low == 0)
        assert (crossing["high"] is None) == math.isinf(x.high)
    assert "not determined which is better" in "\n".join(describe(pair))


def test_families_without_a_common_range():
    runs = runs_of(POWER, 0)
    other = measured(INSIDE["power"], 1, 0.01, counts=6)
    middle = np.median(runs.compute)
    fits = [
        fit_law("power", x, draws=100)
        for x in (runs.where(runs.compute < middle), other.where(other.compute > 3 * middle))
    ]
    result = compare.compare(*fits)
    assert (result.segments, result.ratios, result.share) == ([], [], 0)
    assert not any(x.inside for x in result.crossings)
    assert hold_their_estimates(result)
    text = "\n".join(describe(pair_of(result)))
    assert "no compute at which both have runs; what follows is extrapolated" in text
    assert "do not cross in this range" not in text


# ------------------------------------------------------------------ matching runs


def table(scale: float = 1.0, count: int = 12) -> RunTable:
    """Runs of two models and three seeds, each of a number of samples."""
    rows = [
        {
            "arch": f"m{i % 2}",
            "samples_seen": 10.0 ** (6 + i // 6),
            "seed": i // 2 % 3,
            "gmacs_per_sample": 3.0,
            "training_flops": scale * 10.0 ** (16 + i // 6),
        }
        for i in range(count)
    ]
    return RunTable(rows)


def test_matching_runs_are_compared_with_students_interval():
    pairs = np.random.default_rng(0).uniform(0.2, 0.8, (12, 2))
    estimate: Any = paired(table(), table(), (pairs[:, 0], pairs[:, 1]))
    t = stats.ttest_1samp(np.log(pairs[:, 1] / pairs[:, 0]), 0).confidence_interval()
    np.testing.assert_allclose(estimate[:4], (12, np.exp(np.mean(t)), *np.exp(t)))
    assert (estimate.compute, estimate.unequal) == (1, 0)
    # Runs match by model, samples and seed, in any order; some have no match.
    rows = RunTable(table().rows[::-1][:5])
    some: Any = paired(table(), rows, (pairs[:, 0], pairs[::-1, 1][:5]))
    t = stats.ttest_1samp(np.log(pairs[7:, 1] / pairs[7:, 0]), 0).confidence_interval()
    np.testing.assert_allclose(some[:4], (5, np.exp(np.mean(t)), *np.exp(t)))
    assert paired(table(), RunTable(table().rows[:1]), (pairs[:, 0], pairs[:1, 1])) is None
    # Two runs that share all of this match no other.
    twice = RunTable([*table().rows, table().rows[0]])
    errors = np.append(pairs[:, 0], 0.5)
    fewer: Any = paired(twice, table(), (errors, pairs[:, 1]))
    assert fewer.pairs == 11


def test_matching_runs_of_unequal_compute_are_said_to_be():
    error = np.full(12, 0.5), 0.5 * np.exp(0.01 * np.arange(12))
    alike: Any = paired(table(), table(1.01), error)
    assert alike.unequal == 0
    rows = [*table().rows[:9], *table(2.0).rows[9:]]
    unequal: Any = paired(table(), RunTable(rows), error)
    assert (unequal.pairs, unequal.unequal) == (12, 3)
    assert unequal.compute == pytest.approx(2 ** (3 / 12))
    result = Comparison([], [], [], 0.0)
    text = "\n".join(describe(pair_of(result, unequal)))
    assert "in 12 pairs of matching runs: +5.65% error" in text
    assert "3 differ in compute, B has 1.19 times as much on average" in text
    # Without a count of FLOPs, compute is size times samples.
    plain = RunTable([{k: v for k, v in row.items() if k != "training_flops"} for row in rows])
    halved = RunTable([row | {"gmacs_per_sample": 1.5} for row in plain.rows])
    less: Any = paired(plain, halved, error)
    assert (less.unequal, less.compute) == (12, pytest.approx(0.5))
