"""Pictures hold what they promise, and are the same file twice."""

from pathlib import Path

import numpy as np
import pytest

from clip_jax.scaling import plots
from clip_jax.scaling.compare import Family, crossing
from clip_jax.scaling.fit import Form, fit
from clip_jax.scaling.laws import Additive, PowerLaw, Runs

LAW = Additive(*map(np.array, (0.5, 0.3, 1.0, 40.0, 0.1)))


def named() -> plots.Named:
    size, samples = (x.ravel() for x in np.meshgrid([3.0, 30.0, 300.0], np.geomspace(1e7, 1e10, 4)))
    scatter = np.exp(0.02 * np.random.default_rng(0).standard_normal(12))
    runs = Runs(size, samples, LAW(size, samples) * scatter)
    models = tuple({3.0: "small", 30.0: "medium", 300.0: "large"}[s] for s in size.tolist())
    return plots.Named(runs, models, tuple(f"{s:.0e}" for s in samples.tolist()))


@pytest.mark.parametrize("form", ["power", "additive"])
def test_a_figure_shows_runs_law_and_residuals(form: Form, tmp_path: Path):
    table = named()
    found = fit(form, table.runs, "frontier" if form == "power" else "all", draws=20)
    ahead = (1e13, found.predict(np.array(300.0), np.array(1e13 / 300)))
    page = plots.figure(
        table, found, fit_label="our law", others={"their law": PowerLaw(-0.1, 5.0)},
        predictions={"what is next": ahead}, error_label="held-out loss", title="a ladder",
    )  # fmt: skip
    svg, png = plots.save(page, tmp_path / "figure")
    assert png.read_bytes().startswith(b"\x89PNG")
    text = svg.read_text()
    wanted = ["small", "medium", "large", "1e+07 pairs", "their law", "what is next"]
    wanted += ["held-out loss", "a ladder", "off the law, %", "training FLOPs"]
    wanted += ["our law", "least error of each bin"] if form == "power" else []
    assert [label for label in wanted if label not in text] == []

    upper, lower = page.axes[:2]
    assert upper.get_xscale() == upper.get_yscale() == lower.get_xscale() == "log"
    low, high = lower.get_ylim()
    off = 100 * (table.runs.error / found.law(table.runs.size, table.runs.samples) - 1)
    assert low < off.min() < off.max() < high
    again, _ = plots.save(
        plots.figure(
            table, found, fit_label="our law", others={"their law": PowerLaw(-0.1, 5.0)},
            predictions={"what is next": ahead}, error_label="held-out loss", title="a ladder",
        ),
        tmp_path / "again",
    )  # fmt: skip
    assert again.read_bytes() == svg.read_bytes()


def test_families_are_drawn_side_by_side(tmp_path: Path):
    runs = named().runs
    better = runs._replace(error=runs.error * (runs.compute / 1e10) ** -0.05)
    families = {
        name: Family(some, fit("additive", some, "all", draws=20, seed=seed))
        for seed, (name, some) in enumerate({"first": runs, "second": better}.items())
    }
    page = plots.compared(families, error_label="held-out loss")
    svg, _ = plots.save(page, tmp_path / "figure")
    text = svg.read_text()
    assert all(label in text for label in ("first", "second", "held-out loss", "off first, %"))
    upper, lower = page.axes
    at = crossing(*families.values()).compute
    for axes in (upper, lower):
        assert [line.get_xdata() for line in axes.lines if list(line.get_ydata()) == [0, 1]] == [
            [at, at]
        ]
