"""The files for a paper hold a fit's numbers, and LaTeX can read them."""

import csv
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.scaling import papers, run_table
from clip_jax.scaling.fit import FitConfig, family_of, fit
from clip_jax.scaling.fit_result import Parameter
from clip_jax.scaling.laws import LAWS
from tests.scaling.conftest import POINTS


def rows(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def test_the_files_hold_runs_points_band_and_parameters(tmp_path: Path):
    config = FitConfig(where=("upstream_dataset=LAION*",), procedure="cherti", draws=100)
    table = run_table.read(POINTS).select(config.metric, config.where)
    result = fit(table, config)
    runs, points, curve, tex = papers.write(result, {"": table}, tmp_path / "law")
    assert [Path(x).name for x in (runs, points, curve, tex)] == [
        "law_runs.csv",
        "law_points.csv",
        "law_curve.csv",
        "law.tex",
    ]
    error = np.array([1 - float(row["imagenet1k_acc1"]) for row in rows(runs)])
    compute, off = (
        np.array([float(row[x]) for row in rows(runs)]) for x in ("compute", "residual")
    )
    parameters: Any = result.law
    law = parameters.beta * compute**parameters.alpha
    np.testing.assert_allclose(error / law - 1, off, atol=1e-9)
    assert len(error) == 29
    assert float(rows(points)[0]["error"]) == result.law.points[0].error
    last = rows(curve)[-1]
    assert float(last["low"]) < float(last["error"]) < float(last["high"])
    text = Path(tex).read_text()
    assert text.startswith("\\begin{tabular}{lcc}\n\\toprule\nRuns & $\\alpha$ & $\\beta$ \\\\\n")
    assert "\nall runs & $-0.1114$ $[" in text


def test_each_family_has_its_lines_and_its_name_is_escaped(tmp_path: Path):
    config = FitConfig(where=("upstream_dataset=LAION*",), compare="upstream_dataset", draws=100)
    table = run_table.read(POINTS).select(config.metric, config.where)
    families = table.groups(lambda row: family_of(row, "upstream_dataset"))
    files = papers.write(fit(table, config), families, tmp_path / "law")
    assert {row["family"] for row in rows(files[0])} == {*families}
    assert {row["family"] for row in rows(files[2])} == {*families}
    assert {name for kind in LAWS.values() for name in kind.names()} <= {*papers.SYMBOLS}
    fade = Parameter(2.5e7, (1e6, 3.25e-9), None)
    unknown = Parameter(None, (0.1, 1e9), "other runs")
    lines = papers.latex({"50% of A_1 & B": {"fade": fade}, "C": {"fade": unknown}}).splitlines()
    assert lines[2] == r"Runs & $R$ \\"
    value = r"$2.5 \times 10^{7}$ $[1 \times 10^{6}, 3.25 \times 10^{-9}]$"
    assert lines[4] == rf"50\% of A\_1 \& B & {value} \\"
    assert lines[5] == r"C & -- \\"
