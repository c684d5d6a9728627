"""What points are, how they scatter, when a law misfits, and the published procedures."""

import re
from typing import Any

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import curve_fit

from clip_jax.errors import InputError
from clip_jax.scaling import uncertainty
from clip_jax.scaling.laws import Law, Runs
from clip_jax.scaling.uncertainty import Form, averaged, fit_law, middle, sizes_of
from tests.scaling.known import KNOWN, NOISE, law, measured


def line(seed: int = 0, noise: float = NOISE, count: int = 12) -> Runs:
    """Runs of one size on a power law."""
    samples = np.geomspace(1e9, 1e13, count)
    scatter = noise * np.random.default_rng(seed).standard_normal(count)
    return Runs(np.ones(count), samples, 5 * samples**-0.11 * np.exp(scatter))


def test_directions_that_almost_depend_on_others_do_not_count():
    """Beyond rounding, or of what a law could lack: a thousandth of the direction itself."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 20))
    for off, alone, scaled in ((1e-1, 2, 2), (1e-4, 2, 1), (1e-8, 1, 1)):
        columns = np.stack([first, first + off * second], axis=1)
        for scale, count in ((None, alone), (float(np.linalg.norm(first)), scaled)):
            basis = uncertainty._basis(columns, scale)
            assert basis.shape[1] == count
            np.testing.assert_allclose(basis.T @ basis, np.eye(count), atol=1e-12)


def test_best_sizes_are_looked_for_up_to_ten_times_beyond_the_runs():
    fits = [fit_law("additive", measured(KNOWN["additive"], 0, 0.0, n), draws=20) for n in (3, 4)]
    runs = np.concatenate([fitted.runs.size for fitted in fits])
    low, high = sizes_of(fits)
    assert (low, high) == pytest.approx((runs.min() / 10, 10 * runs.max()))


# ------------------------------------------------------------------ intervals


def test_five_batch_sizes_determine_their_exponents():
    truth = law("batched", 0.5, 0.3, 1.0, 40.0, 0.1, 1.0, 30.0, 0.3, 0.7)
    batches = np.geomspace(256, 65_536, 5)
    axes = np.meshgrid(np.geomspace(3, 300, 3), np.geomspace(1e6, 1e9, 4), batches)
    size, samples, batch = (x.ravel() for x in axes)
    runs = Runs(size, samples, np.ones_like(size), batch)
    exact = runs._replace(error=runs.under(truth))
    fitted: Any = fit_law("batched", exact)
    for name, value in truth.parameters.items():
        assert fitted.law.parameters[name] == pytest.approx(value, rel=1e-3)
    scatter = np.random.default_rng(1).standard_normal(len(size))
    fitted = fit_law("batched", exact._replace(error=exact.error * np.exp(0.02 * scatter)))
    for name in ("negatives_alpha", "steps_alpha", "negatives"):
        low, high, _ = fitted.interval(name)
        assert low < truth.parameters[name] < high < 3 * low
        assert not fitted.lacking(name)
    drawn: Any = fitted.drawn
    low, high = middle(drawn.best_batch(1e8))
    # Where the law has its lowest error, by a search.
    searched = np.geomspace(1e3, 3e4, 1_000)
    best = searched[truth(30.0, 1e8, searched).argmin()]
    assert low < best < high < 1.5 * low
    fewer = fit_law("batched", exact.where(batch < 60_000))
    assert fewer.law.parameters["steps_alpha"] == 0.5
    assert fewer.lacking("steps_alpha").startswith("runs of at least five batch sizes")
    assert not fewer.lacking("steps")


def test_a_straight_lines_intervals_are_the_textbooks():
    """Student's t: of the slope, the line's height and a new run, beyond the data as well."""
    fitted: Any = fit_law("power", line(), draws=20_000)
    x, y, weights = np.log(fitted.runs.compute), np.log(fitted.runs.error), fitted.weights
    reach = stats.t.ppf([0.025, 0.975], fitted.freedom)
    (slope, height), covariance = np.polyfit(x, y, 1, w=np.sqrt(weights), cov="unscaled")
    noise = np.sqrt((weights * (y - slope * x - height) ** 2).sum() / fitted.freedom)
    assert noise == pytest.approx(fitted.noise)
    wanted = slope + reach * noise * np.sqrt(covariance[0, 0])
    np.testing.assert_allclose(fitted.interval("alpha")[:2], wanted)
    beta = np.exp(height + reach * noise * np.sqrt(covariance[1, 1]))
    np.testing.assert_allclose(fitted.interval("beta")[:2], beta)
    drawn = np.array(middle(fitted.drawn.alpha))
    np.testing.assert_allclose(drawn, wanted, atol=0.03 * (wanted[1] - wanted[0]))
    ahead = np.array([np.log(1e14), 1.0])
    variance = noise**2 * ahead @ covariance @ ahead
    new = variance + fitted.spread**2
    for answer, square in ((fitted.curve, variance), (fitted.predict, new)):
        _, low, high = answer(1.0, 1e14)
        np.testing.assert_allclose(np.log(high / low), 2 * reach[1] * np.sqrt(square))


@pytest.mark.parametrize("form", ["saturating", "additive", "repeated", "batched"])
def test_draws_have_the_covariance_of_the_jacobian(form: Form):
    """While noise is small."""
    runs = measured(KNOWN[form], noise=0.01)
    fitted = fit_law(form, runs, draws=100)
    kind, values = type(fitted.law), numbers(fitted.law)
    names = [name for name in kind.names() if name not in kind.VALUES]  # others need more runs

    def log(_: None, *relative: float) -> np.ndarray:
        law = kind(**dict(zip(names, values * relative, strict=True)))
        return np.asarray(np.log(fitted.fitted.under(law)))

    target, sigma = np.log(fitted.fitted.error), fitted.noise / np.sqrt(fitted.weights)
    _, covariance = curve_fit(
        log, None, target, np.ones(len(values)), sigma=sigma, absolute_sigma=True
    )
    spread = np.std(np.log(numbers(fitted.drawn)), axis=1)
    np.testing.assert_allclose(spread, np.sqrt(np.diag(covariance)), rtol=0.3)


def test_draws_of_equal_seeds_are_equal():
    runs = measured(KNOWN["saturating"], noise=0.01)
    first, again = (numbers(fit_law("saturating", runs, draws=20).drawn) for _ in range(2))
    np.testing.assert_array_equal(again, first)


def numbers(law: Law) -> np.ndarray:
    return np.array([x for name, x in law.parameters.items() if name not in law.VALUES])


def test_lines_steeper_than_any_float_are_not_drawn():
    """Three points leave one degree of freedom, of which some draws are extreme."""
    runs = Runs(np.array([1e3, 3e3, 1e4]), np.full(3, 1e12), np.exp([0.3, -0.5, 0.2]))
    drawn: Any = fit_law("power", runs, draws=20_000)
    assert 18_000 < len(drawn.drawn.beta) < 20_000
    assert not np.isnan(drawn.draws(np.array(1e3), np.array(1e12))).any()


def test_an_irreducible_error_that_runs_determine_is_stated():
    for form in ("saturating", "additive"):
        fitted = fit_law(form, measured(KNOWN[form], 0, 0.005, 6, 6))
        law: Any = KNOWN[form]
        estimate: Any = fitted.law
        assert not fitted.lacking("irreducible")
        assert float(estimate.irreducible) == pytest.approx(float(law.irreducible), rel=0.03)
        low, high, _ = fitted.interval("irreducible")
        assert low < law.irreducible < high


# ------------------------------------------------------------------ points


def test_seeds_are_one_point_and_the_luckiest_does_not_win():
    runs = measured(KNOWN["additive"], 0, 0.05, 4, 4, seeds=10)
    fitted: Any = fit_law("additive", runs)
    assert len(fitted.fitted.error) == 16
    means = np.exp(np.log(runs.error).reshape(16, 10).mean(1))
    np.testing.assert_allclose(np.sort(fitted.fitted.error), np.sort(means))
    frontier = fit_law("power", runs, "frontier")
    assert set(np.round(frontier.fitted.error, 9)) <= set(np.round(means, 9))
    # A new run scatters by its noise, the mean of ten by a third of it.
    assert fitted.within == pytest.approx(0.05**2, rel=0.2)
    assert fitted.spread == pytest.approx(0.05, rel=0.15)
    assert fitted.noise == pytest.approx(0.05 / 10**0.5, rel=0.4)
    _, low, high = fitted.predict(30.0, 1e8)
    assert np.log(high / low) / 2 > 1.9 * fitted.spread
    # Runs that differ in a setting, such as their learning rate, are not seeds of each other.
    rates = zip(runs.size, runs.samples, np.tile(["1e-3", "5e-4"], 80), strict=True)
    differ = runs._replace(setting=np.array([str(x) for x in rates]))
    assert len(averaged(differ).seeds) == 32


def test_points_of_more_seeds_count_more():
    """Where seeds are the only scatter, a point's variance is that of a run over its seeds."""
    runs = measured(KNOWN["power"], 0, 0.05, 1, 20, seeds=16)
    runs = runs.where((np.arange(320) < 160) | (np.arange(320) % 16 == 0))
    fitted = fit_law("power", runs)
    assert sorted(set(fitted.seeds)) == [1, 16]
    ratio = fitted.weights
    assert 8 < ratio[fitted.seeds == 16].mean() / ratio[fitted.seeds == 1].mean() <= 16.1
    # Where points scatter far more than seeds, all points count alike.
    effect = np.repeat(np.random.default_rng(5).standard_normal(20), 16)[:320]
    effect = effect[(np.arange(320) < 160) | (np.arange(320) % 16 == 0)]
    fitted = fit_law("power", runs._replace(error=runs.error * np.exp(effect)))
    ratio = fitted.weights
    assert ratio[fitted.seeds == 16].mean() / ratio[fitted.seeds == 1].mean() < 1.1


def test_checkpoints_of_a_run_do_not_narrow_intervals():
    one = line()
    many = one.where(np.repeat(np.arange(12), 10))
    settings, names = np.arange(120).astype(str), np.repeat(np.arange(12), 10).astype(str)
    many = many._replace(setting=settings)
    widths = [
        (x := fit_law("power", runs).interval("alpha")).high - x.low
        for runs in (one, many._replace(run=names), many)
    ]
    assert widths[1] == pytest.approx(widths[0], rel=0.15)
    assert widths[2] < widths[0] / 2
    # Independent residuals of the same runs stay independent.
    alone = measured(KNOWN["power"], 0, 0.03, 1, 40)
    grouped = alone._replace(
        run=np.repeat(np.arange(4), 10)[np.random.default_rng(0).permutation(40)]
    )
    widths = [
        (x := fit_law("power", runs).interval("alpha")).high - x.low for runs in (alone, grouped)
    ]
    assert widths[1] < 1.5 * widths[0]


def test_few_runs_of_many_checkpoints_have_a_usable_interval():
    """A random effect of each of five runs, beside the scatter of its ten checkpoints."""
    inside, widths = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        samples = np.tile(np.geomspace(1e6, 1e10, 10), 5)
        names = np.repeat(np.arange(5), 10)
        size = np.repeat(np.geomspace(3, 300, 5), 10)
        off = np.repeat(0.03 * rng.standard_normal(5), 10) + 0.01 * rng.standard_normal(50)
        runs = Runs(size, samples, np.ones(50), setting=np.arange(50).astype(str))
        runs = runs._replace(error=runs.under(KNOWN["additive"]) * np.exp(off), run=names)
        fitted = fit_law("additive", runs, draws=20)
        _, low, high = fitted.predict(300.0, 4e10)
        truth = float(KNOWN["additive"](300.0, 4e10)) * np.exp(0.03 * rng.standard_normal())
        inside.append(low <= truth <= high)
        widths.append(high / low)
    assert np.mean(inside) >= 0.9
    assert np.median(widths) < 1.8


def test_a_scatter_below_the_binomial_noise_is_luck():
    exact = line(noise=1e-4)
    fitted = fit_law("power", exact._replace(binomial=(0.02 * exact.error) ** 2))
    assert fitted.noise == pytest.approx(0.02, rel=0.05)
    assert fit_law("power", exact).noise < 1e-3
    # Where runs scatter more than that, it changes nothing.
    runs = line(noise=0.1)
    few = runs._replace(binomial=(0.01 * runs.error) ** 2)
    noisy = [fit_law("power", x).noise for x in (runs, few)]
    assert noisy[0] == pytest.approx(noisy[1], rel=1e-9)


def test_scores_of_few_samples_count_less():
    """Binomial noise of half of the runs is five times the others' scatter."""
    offs = []
    for seed in range(20):
        runs = line(seed, 0.01, 24)
        few = np.arange(24) % 2 == 0
        noise = 0.05 * np.random.default_rng([1, seed]).standard_normal(24)
        runs = runs._replace(error=runs.error * np.exp(few * noise))
        binomial = np.where(few, 0.05, 1e-3) ** 2 * runs.error**2
        fits = [fit_law("power", x) for x in (runs, runs._replace(binomial=binomial))]
        offs.append([abs(float(fitted.law.parameters["alpha"]) + 0.11) for fitted in fits])
        assert fits[1].weights[few].mean() < 0.7 * fits[1].weights[~few].mean()
    plain, weighted = np.square(offs).mean(0)
    assert weighted < 0.4 * plain


# ------------------------------------------------------------------ does the law fit?


def test_an_outlier_is_named_and_stays_in_the_fit():
    runs = measured(KNOWN["additive"], 0, 0.01, 4, 5)
    runs = runs._replace(model=np.array([f"m{x:.0f}" for x in runs.size]))
    error = runs.error.copy()
    error[7] *= 1.3
    fitted = fit_law("additive", runs._replace(error=error))
    (warning,) = fitted.misfit()
    assert "one point lies +2" in warning
    assert f"({runs.model[7]}: {runs.size[7]:.4g} GMACs, {runs.samples[7]:.3g} pairs;" in warning
    assert len(fitted.fitted.error) == 20
    without: Any = fitted.without_outliers()
    others = fit_law("additive", runs.where(np.arange(20) != 7))
    np.testing.assert_allclose(numbers(without.law), numbers(others.law))
    assert len(without.fitted.error) == 19
    laws = KNOWN["additive"], without.law, fitted.law
    truth, closer, farther = (float(law(runs.size[7], runs.samples[7])) for law in laws)
    assert abs(closer - truth) < abs(farther - truth)
    # Runs that scatter widely have none.
    assert fit_law("additive", measured(KNOWN["additive"], 0, 0.1, 6, 8)).without_outliers() is None


@pytest.mark.parametrize(
    ("form", "truth", "noise", "message"),
    [
        (
            "power",
            "additive",
            0.02,
            r"residuals of up to .* depend on the size.*\(p = .*try another --form",
        ),
        ("additive", "repeated", 0.02, "the law misfits"),
        ("additive", "batched", 0.01, "the law misfits"),
        ("power", "saturating", 0.03, "the law misfits"),
    ],
)
def test_a_law_that_misfits_gets_a_warning(form: Form, truth: Form, noise: float, message: str):
    for seed in range(3):
        runs = measured(KNOWN[truth], seed, noise, 4, 6)
        hidden = np.asarray(runs.third)[:, None] if truth in ("repeated", "batched") else None
        warnings = fit_law(form, runs._replace(third=None, others=hidden)).misfit()
        assert re.search(message, "\n".join(warnings))


def test_points_farther_from_the_law_than_seeds_from_each_other_misfit():
    """Points have effects of their own, which no curve explains."""
    runs = measured(KNOWN["power"], 0, 0.01, 1, 12, seeds=10)
    effect = np.repeat(0.08 * np.random.default_rng(4).standard_normal(12), 10)
    (warning,) = fit_law("power", runs._replace(error=runs.error * np.exp(effect))).misfit()
    assert re.search(r"points lie [89].\d% from it, seeds of a point only 0.9% from", warning)


def test_residuals_that_keep_their_sign_misfit():
    """A step, which no curve of the test describes well."""
    runs = line(noise=0.01, count=40)
    step = np.where(np.isin(np.arange(40) // 5, (0, 3, 4, 7)), 0.015, -0.015)
    warnings = fit_law("power", runs._replace(error=runs.error * np.exp(step))).misfit()
    assert any("residuals keep their sign along compute" in x for x in warnings)


@pytest.mark.parametrize("form", list(KNOWN))
def test_the_right_form_gets_no_warning(form: Form):
    warned = [fit_law(form, measured(KNOWN[form], seed, counts=5)).misfit() for seed in range(20)]
    assert sum(map(bool, warned)) <= 2


def test_degenerate_tables_end_in_an_answer_or_an_error_of_input():
    """Warnings of NumPy are errors in tests: nothing overflows, nothing is divided by zero."""
    stated = 0
    for form, sizes, counts, noise, kind in (
        ("power", 1, 3, 0.0, "flat"),
        ("power", 1, 3, 0.3, "flat"),
        ("saturating", 1, 6, 0.0, "flat"),
        ("saturating", 2, 3, 0.01, "rising"),
        ("saturating", 5, 1, 0.01, "rising"),
        ("additive", 2, 2, 0.0, "flat"),
        ("additive", 2, 3, 0.01, "flat"),
        ("additive", 3, 3, 0.0, "rising"),
        ("batched", 2, 2, 0.01, "flat"),
        ("repeated", 1, 1, 0.0, "flat"),
        ("power", 1, 1, 0.0, "flat"),
    ):
        runs = measured(KNOWN[form], 1, 0.0, sizes, counts)
        error = 0.5 if kind == "flat" else 0.01 * runs.size**0.2 * runs.samples**0.1
        scatter = noise * np.random.default_rng(3).standard_normal(len(runs.error))
        try:
            fitted = fit_law(form, runs._replace(error=error * np.exp(scatter)), draws=20)
        except InputError:
            continue
        stated += 1
        for name, value in fitted.law.parameters.items():
            low, high, _ = fitted.interval(name)
            assert low <= value * (1 + 1e-9)
            assert high >= value * (1 - 1e-9)
            # Neither flat nor rising errors determine how they fall.
            assert fitted.lacking(name) or form == "power" or name == "irreducible"
        fitted.misfit()
        for best in fitted.best(np.array([1e9, 1e13]), (0.3, 3e3)):
            assert not np.isnan(np.stack(best)).any()
    assert stated >= 8


# ------------------------------------------------------------------ published procedures


def swept(seed: int = 0) -> Runs:
    """A sweep: at each compute some runs end above the law."""
    rng, compute = np.random.default_rng(seed), np.repeat(np.geomspace(1e9, 1e13, 25), 4)
    scatter = 0.002 * rng.standard_normal(100) + 0.1 * rng.exponential(size=100)
    return Runs(np.ones(100), compute, 5 * compute**-0.11 * np.exp(scatter))


def test_bins_of_a_frontier_are_resampled_by_run():
    runs = swept(1)
    first, second = (fit_law("power", runs, "cherti", bins=5, draws=200, seed=3) for _ in range(2))
    assert len(first.fitted.error) == 5
    np.testing.assert_array_equal(numbers(first.drawn), numbers(second.drawn))
    other = fit_law("power", runs, "cherti", bins=10, draws=200, seed=3)
    assert len(other.fitted.error) == 10
    assert other.interval("alpha") != first.interval("alpha")
    run, curve = first.predict(1.0, 1e14), first.curve(1.0, 1e14)
    ordered = np.array([run.low, curve.low, curve.error, curve.high, run.high])
    assert (np.diff(ordered) > 0).all()
    assert first.misfit() == []


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("form", "procedure", "changes", "message"),
    [
        ("additive", "frontier", {}, "needs sizes and samples"),
        ("saturating", "all", {}, "3 points .* 4 parameters"),
        ("power", "frontier", {"error": np.array([0.5, 0.1, 0.0])}, "positive"),
        ("repeated", "all", {}, "distinct samples of each run, more than 0"),
        ("batched", "all", {"third": np.zeros(3)}, "batch of each run, more than 0"),
        ("power", "all", {"size": np.ones(3)}, "all runs have about the same compute"),
        ("power", "laion", {}, "procedure=laion fits the form saturating, not power"),
        ("saturating", "laion", {}, "selects 0 of 3 runs, but needs 5; it takes the best runs"),
    ],
)
def test_what_cannot_be_fitted_is_refused(form, procedure, changes, message):
    runs = Runs(np.arange(1.0, 4), np.ones(3), np.full(3, 0.5))
    with pytest.raises(InputError, match=message):
        fit_law(form, runs._replace(**changes), procedure)
