"""Families side by side: where their laws cross, and how often the interval of that holds."""

import numpy as np
import pytest

from clip_jax.scaling.compare import Family, crossing, paired, ratios, side_by_side
from clip_jax.scaling.fit import Form, fit
from clip_jax.scaling.laws import Additive, Law, PowerLaw, Runs, Saturating, optimum

NOISE = 0.03
# Pairs of laws that cross once, inside of the runs' compute.
PAIRS: dict[Form, tuple[Law, Law]] = {
    "power": (
        PowerLaw(np.array(-0.11), np.array(5.0)),
        PowerLaw(np.array(-0.16), np.array(5.0 * 1e10**0.05)),
    ),
    "saturating": (
        Saturating(*map(np.array, (0.4, 1e8, 400.0, 0.2))),
        Saturating(*map(np.array, (0.4, 1e8, 900.0, 0.2 - 500 * (1e10 + 1e8) ** -0.4))),
    ),
    "additive": (
        Additive(*map(np.array, (0.5, 0.3, 1.0, 40.0, 0.1))),
        # Of equal irreducible errors, whether they cross at all would not be sure.
        Additive(*map(np.array, (0.6, 0.4, 1.1, 280.0, 0.07))),
    ),
}


def measured(law: Law, seed: int) -> Runs:
    size, samples = (
        x.ravel() for x in np.meshgrid(np.geomspace(3, 300, 4), np.geomspace(1e6, 1e10, 5))
    )
    scatter = np.exp(NOISE * np.random.default_rng(seed).standard_normal(size.shape))
    return Runs(size, samples, law(size, samples) * scatter)


def families(form: Form, seed: int, draws: int) -> tuple[Family, Family]:
    made = []
    for number, law in enumerate(PAIRS[form]):
        runs = measured(law, 2 * seed + number)
        made.append(Family(runs, fit(form, runs, "all", draws=draws, seed=2 * seed + number)))
    return made[0], made[1]


def true_crossing(form: Form) -> float:
    """By halving: where the laws of a pair are equal."""
    low, high = 1e7, 1e13

    def gap(c: float) -> float:
        one, other = (optimum(law, np.array(c), (0.3, 3e3)).error for law in PAIRS[form])
        return float(one - other)

    assert gap(low) < 0 < gap(high)
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if gap(middle) < 0 else (low, middle)
    return low


@pytest.mark.parametrize("form", PAIRS)
def test_a_crossing_is_found_with_its_interval(form: Form):
    first, second = families(form, 0, draws=100)
    truth = true_crossing(form)
    found = crossing(first, second)
    assert found.better == 1
    assert found.compute is not None
    assert found.low < truth < found.high
    assert found.low < found.compute < found.high
    assert found.share > 0.9
    back = crossing(second, first)
    assert back.better == 0
    np.testing.assert_allclose(np.array(back[1:], float), np.array(found[1:], float))


def test_laws_that_keep_their_order_do_not_cross():
    runs = measured(PAIRS["power"][0], 0)
    worse = runs._replace(error=1.3 * measured(PAIRS["power"][0], 1).error)
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
    found = paired(np.stack([one, one * 1.02 * np.exp(0.01 * rng.standard_normal(12))], axis=1))
    assert found
    assert found.pairs == 12
    assert found.low < 1.02 < found.high
    assert found.high - found.low < 0.02


def covered(form: Form, tables: int, draws: int) -> float:
    truth, inside = true_crossing(form), []
    for seed in range(tables):
        found = crossing(*families(form, seed, draws))
        inside.append(found.low <= truth <= found.high)
    return float(np.mean(inside))


@pytest.mark.parametrize("form", ["power", "saturating"])
def test_crossings_lie_in_their_intervals_about_as_often_as_these_say(form: Form):
    """Twenty pairs of tables: 95% is 19 ± 1 of them."""
    assert covered(form, tables=20, draws=40) >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("form", PAIRS)
def test_coverage_of_crossings(form: Form, capsys: pytest.CaptureFixture[str]):
    share = covered(form, tables=200, draws=200)
    with capsys.disabled():
        print(f"\n{form}: the crossing {share:.1%}")
    assert 0.9 <= share <= 0.98
