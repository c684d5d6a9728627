"""How often a 95% interval holds the truth, on laws that are known."""

import numpy as np
import pytest

from clip_jax.scaling.fit import fit, fit_line
from clip_jax.scaling.laws import PowerLaw, Runs, Saturating

NOISE = 0.03
DRAWS = 1_000


@pytest.mark.parametrize("points", [12, 30])
def test_a_straight_lines_interval_covers_the_truth(points: int):
    rng = np.random.default_rng(points)
    x = np.log(np.geomspace(1e9, 1e13, points))
    y = np.log(5.0) - 0.11 * x + NOISE * rng.standard_normal((DRAWS, points))
    line = fit_line(x, y)
    low, high = line.slope_interval()
    assert abs(np.mean((low < -0.11) & (high > -0.11)) - 0.95) < 0.03
    for new in (False, True):  # beyond the data, where it is needed
        truth = np.log(5.0) - 0.11 * np.log(1e14) + new * NOISE * rng.standard_normal(DRAWS)
        at = line.at(np.log(1e14), new)
        assert abs(np.mean((at.low < truth) & (truth < at.high)) - 0.95) < 0.03


def test_what_fit_reports_is_that_interval():
    rng = np.random.default_rng(0)
    samples = np.geomspace(1e9, 1e13, 12)
    error = 5 * samples**-0.11 * np.exp(NOISE * rng.standard_normal(12))
    found = fit("power", Runs(np.ones(12), samples, error), "all")
    line = fit_line(np.log(samples), np.log(error))
    assert found.interval("alpha") == tuple(map(float, line.slope_interval()))
    ahead = found.predict(np.array([1.0]), np.array([1e14]))
    np.testing.assert_allclose(np.log(ahead.low), line.at(np.log([1e14]), new=True).low)


def ladder(law: PowerLaw | Saturating, seed: int, excess: float) -> Runs:
    """36 runs on 12 amounts of compute; `excess`: how far above the law a run may end."""
    rng = np.random.default_rng(seed)
    compute = np.repeat(np.geomspace(1e9, 1e13, 12), 3)
    one = np.ones_like(compute)
    scatter = NOISE * rng.standard_normal(36) + excess * rng.exponential(size=36)
    return Runs(one, compute, law(one, compute) * np.exp(scatter))


def test_coverage_of_the_frontier_is_measured(capsys: pytest.CaptureFixture[str]):
    # Nothing is promised here: a percentile bootstrap of minima is known to fall short.
    law = PowerLaw(np.array(-0.11), np.array(5.0))
    inside = []
    for seed in range(100):
        low, high = fit("power", ladder(law, seed, excess=0.1), draws=200).interval("alpha")
        inside.append(low < law.alpha < high)
    with capsys.disabled():
        print(f"\nfrontier: the 95% interval of alpha covers {np.mean(inside):.1%} of 100")
    assert np.mean(inside) > 0.5


@pytest.mark.slow
def test_coverage_of_the_irreducible_error_is_measured(capsys: pytest.CaptureFixture[str]):
    law = Saturating(*map(np.array, (0.3, 1e8, 300.0, 0.15)))
    inside, widths = [], []
    for seed in range(100):
        found = fit("saturating", ladder(law, seed, excess=0.0), "all", draws=200)
        low, high = found.interval("irreducible")
        inside.append(low <= law.irreducible <= high)
        widths.append(high - low)
    with capsys.disabled():
        print(
            f"\nirreducible error: the 95% interval covers {np.mean(inside):.1%} of 100; "
            f"median width {np.median(widths):.3f} around {law.irreducible}"
        )
    assert np.mean(inside) > 0.5
