"""The published fits, known laws recovered, and what a fit refuses."""

import csv
from pathlib import Path

import numpy as np
import pytest

from clip_jax.scaling import fit as fits
from clip_jax.scaling.fit import fit
from clip_jax.scaling.laws import Additive, PowerLaw, Runs, Saturating, frontier, pareto

POINTS = Path(__file__).parent.parent / "golden" / "scaling_points.csv"
# Cherti et al. 2023, computed from the published points by the paper's own procedure.
PUBLISHED = {
    "imagenet1k_acc1": ((-0.1114, 5.858), (-0.1638, 23.18)),
    "imagenet_robustness_acc1": ((-0.1255, 11.61), (-0.2378, 211.7)),
    "mscoco_captions_img_r5": ((-0.0794, 2.750), (-0.0508, 1.589)),
    "flickr30k_img_r5": ((-0.1892, 15.51), (-0.1028, 2.208)),
}


def published(metric: str, laion: bool) -> Runs:
    with POINTS.open() as file:
        rows = [
            r for r in csv.DictReader(file) if r["upstream_dataset"].startswith("LAION") == laion
        ]

    def column(name: str) -> np.ndarray:
        return np.array([float(row[name]) for row in rows])

    return Runs(column("gmacs_per_sample"), column("samples_seen"), 1 - column(metric))


@pytest.mark.parametrize("metric", PUBLISHED)
def test_the_eight_published_fits_to_four_digits(metric: str):
    for laion, (alpha, beta) in zip((True, False), PUBLISHED[metric], strict=True):
        found = fit("power", published(metric, laion), "frontier" if laion else "all", draws=10)
        assert round(float(found.law.alpha), 4) == alpha
        assert float(f"{found.law.beta:.4g}") == beta


def test_the_published_predictions():
    found = fit("power", published("imagenet1k_acc1", True))
    sizes, samples = np.array([190.97, 290.74, 532.92]), np.array([68e9, 34e9, 68e9])
    predicted = found.predict(sizes, samples)
    np.testing.assert_array_equal(np.round(100 * (1 - predicted.error), 1), [79.7, 79.1, 81.9])
    # g/14 at 34B was later measured at 78.5%: inside the interval.
    assert predicted.low[1] < 1 - 0.785 < predicted.high[1]


@pytest.mark.parametrize("through", ["frontier", "all"])
def test_a_single_run_is_less_certain_than_the_law(through: fits.Through):
    found = fit("power", published("imagenet1k_acc1", True), through)
    run, law = (f(np.array(190.97), np.array(68e9)) for f in (found.predict, found.curve))
    assert run.error == law.error
    assert run.low < law.low < law.error < law.high < run.high


def test_all_points_and_the_frontier_differ():
    runs = published("imagenet1k_acc1", True)
    assert round(float(fit("power", runs, "all").law.alpha), 3) == -0.101


def test_the_published_points_determine_no_irreducible_error():
    runs = published("imagenet1k_acc1", True)
    for form, through in (("saturating", "all"), ("additive", "all")):
        found = fit(form, runs, through, draws=40)
        low, high = found.interval("irreducible")
        assert low == 0 < 0.1 < high
        assert fits.irreducible(found) is None
    assert fits.irreducible(fit("power", runs)) is None


def grid(law: PowerLaw | Saturating | Additive, noise: float = 0.0, seed: int = 0) -> Runs:
    """Runs of six sizes, each at six sample counts."""
    size, samples = np.meshgrid(np.geomspace(3, 300, 6), np.geomspace(1e6, 1e10, 6))
    size, samples = size.ravel(), samples.ravel()
    scatter = np.exp(noise * np.random.default_rng(seed).standard_normal(size.shape))
    return Runs(size, samples, law(size, samples) * scatter)


def test_a_power_law_is_recovered():
    law = PowerLaw(np.array(-0.2), np.array(3.0))
    found = fit("power", grid(law), "all")
    np.testing.assert_allclose(found.law, law, rtol=1e-9)
    np.testing.assert_allclose(found.interval("beta"), 3.0, rtol=1e-6)


def test_the_frontier_stretches_as_the_published_procedure_does():
    # One run a bin, half a decade apart; the bins, 0.1 wider in all, stand 0.42 apart.
    samples = 10 ** np.arange(6.0, 8.5, 0.5)
    found = fit("power", Runs(np.ones(5), samples, 3 * samples**-0.2))
    np.testing.assert_allclose(found.law.alpha, -0.2 * 0.5 / 0.42, rtol=1e-9)


def test_a_saturating_law_is_recovered_and_its_irreducible_error_stated():
    law = Saturating(*map(np.array, (0.4, 1e8, 400.0, 0.2)))
    found = fit("saturating", grid(law, noise=0.005), "all", draws=100)
    np.testing.assert_allclose(found.law.irreducible, 0.2, rtol=0.03)
    np.testing.assert_allclose(found.law.alpha, 0.4, rtol=0.1)
    assert fits.irreducible(found) == pytest.approx(0.2, rel=0.03)
    exact = fit("saturating", grid(law), "all", draws=5).law
    np.testing.assert_allclose(exact[:2] + exact[3:], law[:2] + law[3:], rtol=0.03)


def test_an_additive_law_is_recovered_and_divides_a_budget():
    law = Additive(*map(np.array, (0.5, 0.3, 1.0, 40.0, 0.1)))
    runs = grid(law, noise=0.005)
    found = fit("additive", runs, "all", draws=50)
    np.testing.assert_allclose(found.law[:2], law[:2], rtol=0.1)
    assert fits.irreducible(found) == pytest.approx(0.1, rel=0.1)

    sizes = np.geomspace(3, 300, 12)
    choice = fits.allocate(found, 1e9, sizes)
    assert choice.best == law(sizes, 1e9 / sizes).argmin()
    assert choice.samples == 1e9 / sizes[choice.best]
    assert choice.share.sum() == pytest.approx(1)
    assert choice.share[choice.best] > 0.5
    # With much more to spend, a larger model.
    assert fits.allocate(found, 1e11, sizes).best > choice.best


def test_a_fit_of_small_runs_predicts_large_ones():
    runs = grid(Additive(*map(np.array, (0.5, 0.3, 1.0, 40.0, 0.1))), noise=0.01)
    held = runs.samples == runs.samples.max()
    result = fits.hold_out("additive", runs, held, "all", draws=50)
    assert len(result.runs.error) == 6
    assert result.within.all()
    assert np.abs(result.relative_error).max() < 0.1

    late = runs.compute > 1e11
    best = fits.hold_out("power", runs, late, draws=50)
    assert len(best.runs.error) == (late & pareto(runs)).sum() < late.sum()


def test_the_frontier_is_the_least_error_of_each_bin():
    compute = np.array([1.0, 2.0, 30.0, 40.0, 1000.0])
    error = np.array([0.9, 0.8, 0.5, 0.6, 0.1])
    centre, least = frontier(compute, error, np.array([0.0, 1.0, 2.0, 3.0, 4.0]))
    np.testing.assert_allclose(centre, 10 ** np.array([0.5, 1.5, 2.5, 3.5]))
    np.testing.assert_array_equal(least, [0.8, 0.5, np.inf, 0.1])
    runs = Runs(compute, np.ones(5), error)
    np.testing.assert_array_equal(pareto(runs), [True, True, True, False, True])


@pytest.mark.parametrize(
    ("form", "through", "message"),
    [
        ("additive", "frontier", "needs sizes and samples"),
        ("additive", "all", "3 points .* 5 parameters"),
        ("saturating", "all", "3 points .* 4 parameters"),
    ],
)
def test_what_cannot_be_fitted_is_refused(form: fits.Form, through: fits.Through, message: str):
    with pytest.raises(ValueError, match=message):
        fit(form, Runs(np.arange(1.0, 4), np.ones(3), np.full(3, 0.5)), through)


def test_errors_that_have_no_logarithm_are_refused():
    with pytest.raises(ValueError, match="positive"):
        fit("power", Runs(np.arange(1.0, 4), np.ones(3), np.array([0.5, 0.1, 0.0])))


def test_the_same_table_gives_the_same_interval():
    runs = published("imagenet1k_acc1", True)
    first, second = (fit("power", runs, seed=1) for _ in range(2))
    assert first.interval("alpha") == second.interval("alpha")
    size, samples = np.array([200.0]), np.array([1e11])
    np.testing.assert_array_equal(first.predict(size, samples), second.predict(size, samples))
