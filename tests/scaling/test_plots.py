"""Pictures hold what they promise, and are the same file twice."""

from typing import Any

import numpy as np
import pytest
from matplotlib.lines import Line2D
from matplotlib.text import Text

from clip_jax.scaling import laws, plots
from clip_jax.scaling.laws import PowerLaw, Runs
from clip_jax.scaling.uncertainty import Fit, Form, fit_law
from tests.scaling.known import KNOWN, measured


def named() -> Runs:
    runs = measured(KNOWN["additive"], noise=0.02, sizes=3)
    models = [{3: "small", 30: "$^medium$", 300: "large"}[round(s)] for s in runs.size]
    lengths = [f"{s:.0e}" for s in runs.samples]
    return runs._replace(model=np.array(models), length=np.array(lengths))


def words(page: Any) -> list[str]:
    return [text.get_text() for text in page.findobj(Text)]


def figure_of(fitted: Fit) -> Any:
    ahead = (1e13, fitted.predict(np.array(300.0), np.array(1e13 / 300)))
    return plots.figure(
        fitted,
        others={"their law": PowerLaw(-0.1, 5.0)},
        predictions={"what is next": ahead},
        error_label="held-out loss",
        title="a $^ladder$",
    )


@pytest.mark.parametrize("form", ["power", "additive"])
def test_a_figure_shows_runs_law_and_residuals(form: Form):
    runs = named()
    fitted = fit_law(form, runs, "frontier" if form == "power" else "all", draws=20)
    page = figure_of(fitted)
    wanted = ["small", r"\$^medium\$", "large", "1e+06 pairs", "their law", "what is next"]
    wanted += [
        "held-out loss",
        r"a \$^ladder\$",
        "deviation, %",
        "training FLOPs (3 × forward)",
    ]
    wanted += ["fit, 95% band", "points of the fit"] if form == "power" else []
    assert {*wanted} <= {*words(page)}
    upper, lower = page.axes[:2]
    assert upper.get_xscale() == upper.get_yscale() == lower.get_xscale() == "log"
    low, high = lower.get_ylim()
    off = 100 * (runs.error / fitted.law(runs.size, runs.samples) - 1)
    assert low < off.min() < off.max() < high


def test_a_figure_is_the_same_file_twice(tmp_path):
    fitted = fit_law("power", named(), "frontier", draws=20)
    first, again = (plots.save(figure_of(fitted), tmp_path / name) for name in "ab")
    assert first[1].read_bytes().startswith(b"\x89PNG")
    assert again[0].read_bytes() == first[0].read_bytes()
    assert "small" in first[0].read_text()


def test_runs_that_the_law_does_not_describe_are_faint():
    once = named()
    runs = Runs(*(None if x is None else np.concatenate([x, x]) for x in once))  # two seeds
    runs = runs._replace(error=runs.error * np.repeat([0.99, 1.01], len(once.error)))
    for procedure, faint in (("all", 0), ("frontier", 2 * (laws.pareto(runs) == 0).sum())):
        page = plots.figure(fit_law("power", runs, procedure, draws=20))
        lines = [line for line in page.findobj(Line2D) if line.get_alpha() == 0.3]
        assert len(lines) == faint  # each in the plot of errors, and in that of deviations
