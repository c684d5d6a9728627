"""The laws themselves: what samples are worth, how compute is divided best, the frontier."""

import numpy as np
import pytest

from clip_jax.scaling.laws import Runs, frontier, pareto
from clip_jax.scaling.uncertainty import fit_law
from tests.scaling.known import KNOWN, measured


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
    division = law.optimum(compute, (1e-3, 1e6))
    np.testing.assert_allclose(division.size * division.samples, compute)
    for nearby in (0.9, 1.1):
        error = law(division.size * nearby, division.samples / nearby)
        assert (error > division.error).all()
    slope = np.diff(np.log(division.size)) / np.diff(np.log(compute))
    np.testing.assert_allclose(slope, 0.3 / 0.8)
    assert law.optimum(compute, (1.0, 2.0)).size.max() == 2.0
    sizes = (1e-3, 1e6)
    _, low, high = fit_law("additive", measured(law), "all").best(compute, sizes)["error"]
    assert ((low < division.error) & (division.error < high)).all()


def test_the_frontier_is_the_least_error_of_each_bin():
    compute = np.array([1.0, 2.0, 30.0, 30.0, 1000.0])
    error = np.array([0.9, 0.8, 0.5, 0.6, 0.1])
    centre, least = frontier(compute, error, np.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(centre, 10 ** np.array([0.5, 1.5, 2.5, 3.5]))
    np.testing.assert_array_equal(least, [0.8, 0.5, np.inf, 0.1])
    runs = Runs(compute, np.ones(5), error)
    np.testing.assert_array_equal(pareto(runs), [True, True, True, False, True])
