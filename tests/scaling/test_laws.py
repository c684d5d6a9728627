"""The laws: what samples and batches are worth, best divisions, least squares, the frontier."""

from typing import Any

import numpy as np
import pytest
from scipy.optimize import curve_fit, least_squares

from clip_jax.scaling.law_forms import FORMS
from clip_jax.scaling.laws import LAWS, Batched, Runs, fit_one, frontier, pareto
from clip_jax.scaling.run_table import read
from clip_jax.scaling.uncertainty import Form
from tests.conftest import ROOT
from tests.scaling.conftest import POINTS
from tests.scaling.known import KNOWN, law, measured


def test_repeated_samples_count_less():
    law = KNOWN["repeated"]
    # Seen four times, samples are nearly as good as new; seen a thousand times, worth 16 epochs.
    assert 1 < law(100.0, 4e7, 1e7) / law(100.0, 4e7) < 1.05
    assert law(100.0, 1e10, 1e7) == pytest.approx(law(100.0, 16e7), rel=0.02)
    assert law(100.0, 1e6, 1e9) == law(100.0, 1e6)  # none of them twice


def test_a_batch_can_be_too_small_and_too_large():
    law: Any = KNOWN["batched"]
    batch = np.geomspace(1, 1e6, 601)
    for samples in (1e8, 1e10):
        error = law(100.0, samples, batch)
        best = law.best_batch(samples)
        assert best == pytest.approx(batch[error.argmin()], rel=0.03)
        assert best == pytest.approx(2 / 100 * samples**0.5)
        assert law(100.0, samples) == law(100.0, samples, best) <= error.min()
    only = {name: Batched(**(law.parameters | {name: 0.0})) for name in ("negatives", "steps")}
    assert only["negatives"].best_batch(1e8) == 0
    assert only["steps"].best_batch(1e8) == np.inf
    # There is nothing below one sample nor beyond all of them.
    assert only["negatives"](100.0, 1e8) == only["negatives"](100.0, 1e8, 1.0)
    assert only["steps"](100.0, 1e8) == only["steps"](100.0, 1e8, 1e8)


@pytest.mark.parametrize(
    ("form", "exact"), [("additive", 2e-4), ("repeated", 2e-4), ("batched", 0.015)]
)
def test_compute_is_divided_best(form: Form, exact: float):
    law: Any = KNOWN[form]
    compute = np.geomspace(1e8, 1e12, 5)
    division = law.optimum(compute, (0.1, 1e4))
    np.testing.assert_allclose(division.size * division.samples, compute)
    np.testing.assert_allclose(division.error, law(division.size, division.samples))
    for nearby in (0.9, 1.1):
        error = law(division.size * nearby, division.samples / nearby)
        assert (error > division.error).all()
    sizes = np.geomspace(0.1, 1e4, 100_000)
    best = sizes[law(sizes[:, None], compute / sizes[:, None]).argmin(0)]
    np.testing.assert_allclose(division.size, best, rtol=exact)
    assert law.optimum(compute, (1.0, 2.0)).size.max() == 2.0
    if form != "batched":
        slope = np.diff(np.log(division.size)) / np.diff(np.log(compute))
        np.testing.assert_allclose(slope, 0.3 / 0.8)
        assert law.size_exponent == pytest.approx(0.3 / 0.8)


@pytest.mark.parametrize("form", ["saturating", "additive", "repeated", "batched"])
def test_least_squares_are_those_of_scipy(form: Form):
    """Two tables at once, with unequal weights, of residuals of log E."""
    truth, kind = KNOWN[form], LAWS[form]
    runs = measured(truth, 0, 0.01)
    error = np.stack([runs.error, measured(truth, 1, 0.01).error])
    weights = np.random.default_rng(2).uniform(0.2, 2, error.shape)
    fitted = kind.fitted(runs, error, weights)
    names = [name for name in kind.names() if name not in kind.VALUES]  # others need more runs
    values = np.array([truth.parameters[name] for name in names])
    for i in range(2):

        def log(_, *relative: float) -> np.ndarray:
            law = kind(**dict(zip(names, values * relative, strict=True)))
            return np.log(runs.under(law))

        expected, _ = curve_fit(
            log, None, np.log(error[i]), np.ones(len(values)), sigma=weights[i] ** -0.5
        )
        law = fitted.map(lambda x, i=i: x[i])
        fitted_values = np.array([float(law.parameters[name]) for name in names])
        np.testing.assert_allclose(fitted_values, values * expected, rtol=1e-2)
        mine, scipys = (
            (weights[i] * np.square(np.log(error[i] / runs.under(x)))).sum()
            for x in (law, kind(**dict(zip(names, values * expected, strict=True))))
        )
        assert scipys * (1 - 1e-6) < mine < scipys * (1 + 1e-4)


def test_coefficients_are_not_negative():
    """Errors that rise with size: the best law without negative terms ignores the size."""
    runs = measured(law("additive", 0.5, 0.3, 1.0, 40.0, 0.1), 0, 0.0)
    risen = runs._replace(error=40 * runs.samples**-0.3 + 0.001 * runs.size**0.5)
    fitted: Any = LAWS["additive"].fitted(risen, risen.error[None], np.ones((1, 16)))
    assert fitted.size_scale[0] == 0
    assert min(*fitted.samples_scale, *fitted.irreducible) >= 0


def test_distinct_values_and_the_parameters_that_they_determine():
    def free(form: Form, sizes: int, counts: int) -> int:
        return LAWS[form].free(measured(KNOWN[form], 0, 0.0, sizes, counts))

    runs = measured(KNOWN["batched"], 0, 0.0, 2, 4)
    assert [runs.values(x) for x in ("size", "samples", "third", "compute")] == [2, 4, 3, 8]
    # Batches of 2.56B and 2.57B pairs are the same number of samples.
    nearly = runs._replace(samples=runs.samples * (1 + 0.01 * (np.arange(24) % 2)))
    assert nearly.values("samples") == 4
    assert [free("additive", sizes, 4) for sizes in (1, 2, 3, 4)] == [3, 4, 5, 5]
    assert [free("additive", 4, counts) for counts in (1, 2, 3)] == [3, 4, 5]
    assert (free("repeated", 3, 3), free("batched", 3, 3), free("batched", 1, 3)) == (6, 7, 5)
    assert (free("power", 1, 1), free("saturating", 1, 1)) == (2, 4)


def test_the_frontier_is_the_least_error_of_each_bin():
    compute = np.array([1.0, 2.0, 30.0, 30.0, 1000.0])
    error = np.array([0.9, 0.8, 0.5, 0.6, 0.1])
    centre, least = frontier(compute, error, np.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(centre, 10 ** np.array([0.5, 1.5, 2.5, 3.5]))
    np.testing.assert_array_equal(least, [0.8, 0.5, np.inf, 0.1])
    runs = Runs(compute, np.ones(5), error)
    np.testing.assert_array_equal(pareto(runs), [True, True, True, False, True])


def published_runs(name: str) -> Runs:
    """The runs of a table in the repository, or of a data set in one."""
    if name == "digits":
        return read(ROOT / "notebooks/ladder_digits.csv").runs("info_nce", is_score=False)
    if name == "comparison":
        table = read(ROOT / "tests/golden/laion_imagenet.csv", ("gmacs_per_sample=gflops:GFLOPs",))
        return table.runs("imagenet1k_acc1", is_score=True)
    table = read(POINTS).select("imagenet1k_acc1", (f"upstream_dataset={name}",))
    return table.runs("imagenet1k_acc1", is_score=True)


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("LAION-2B", "saturating"),
        ("LAION-2B", "broken"),
        ("LAION-400M", "additive"),
        ("digits", "additive"),
        ("digits", "broken"),
        ("comparison", "saturating"),
        ("comparison", "interaction"),
    ],
)
def test_one_table_is_fitted_as_well_as_by_scipy_from_any_start(name: str, form: Form):
    """The best of twenty random starts, to four digits of each prediction."""
    runs = published_runs(name)
    kind, rng = FORMS[form], np.random.default_rng(0)
    fitted = fit_one(kind, runs, np.ones(len(runs.error)))
    names = kind.inside()
    bounds = np.log([[x[0], x[-1]] for x in kind.grid(runs)])
    terms = kind.factors(runs)
    best = None
    for _ in range(20):
        inside = rng.uniform(*bounds.T)
        unit = terms(*np.exp(inside)).max(axis=-1)

        def predicted(values: np.ndarray, unit: np.ndarray = unit) -> np.ndarray:
            powers = np.exp(values[: len(names)])
            return np.maximum((values[len(names) :] / unit) @ terms(*powers), 1e-300)

        solved = least_squares(
            lambda x, predicted=predicted: np.log(predicted(x) / runs.error),
            np.concatenate([inside, np.full(len(unit), runs.error.mean() / len(unit))]),
            bounds=(
                [*bounds[:, 0], *np.zeros(len(unit))],
                [*bounds[:, 1], *np.full(len(unit), np.inf)],
            ),
            x_scale="jac",
            xtol=1e-12,
            ftol=1e-12,
            max_nfev=100,
        )
        if best is None or solved.cost < best[0]:
            best = solved.cost, predicted(solved.x)
    assert best is not None
    np.testing.assert_allclose(runs.under(fitted), best[1], rtol=1e-4)
