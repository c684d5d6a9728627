"""Write a fit for a paper: CSV files of its runs, points and band, and a LaTeX table of its law."""

import re
from collections.abc import Mapping
from dataclasses import asdict

from clip_jax.scaling import run_table
from clip_jax.scaling.fit_result import FitResult, Parameter
from clip_jax.scaling.run_table import Row, RunTable, number, text
from clip_jax.storage.files import AnyPath, write_whole

SYMBOLS = {  # of the parameters, as in the documentation's table of laws
    "alpha": r"\alpha",
    "beta": r"\beta",
    "scale": "A",
    "offset": "B",
    "irreducible": r"E_\infty",
    "size_alpha": "a",
    "samples_alpha": "b",
    "size_scale": "A",
    "samples_scale": "B",
    "interaction": "G",
    "later_alpha": r"\alpha'",
    "breaks": "C_1",
    "fade": "R",
    "negatives": "G",
    "steps": "S",
    "negatives_alpha": "n",
    "steps_alpha": "s",
}
ENDINGS = ("_runs.csv", "_points.csv", "_curve.csv", ".tex")


def paths(stem: AnyPath) -> list[AnyPath]:
    """Return the paths of the four files that `write` writes."""
    return [stem.with_name(stem.name + ending) for ending in ENDINGS]


def write(result: FitResult, tables: Mapping[str, RunTable], stem: AnyPath) -> list[str]:
    """Write the laws of a fit; return the paths of the files.

    `tables` has the fitted runs by family, with the only key "" for one law. The files are
    `STEM_runs.csv` (runs and their relative residuals), `STEM_points.csv` (the points of the fit),
    `STEM_curve.csv` (the law with its 95% band over compute) and `STEM.tex` (the parameters).
    """
    runs: list[Row] = []
    points: list[Row] = []
    curve: list[Row] = []
    for family, law in result.laws.items():
        for row, residual in zip(tables[family].rows, law.residuals, strict=True):
            names = ("arch", "samples_seen", "seed", result.metric)
            runs.append(
                {
                    "family": family,
                    **{name: text(row, name) for name in names},
                    "compute": number(row, "gmacs_per_sample") * number(row, "samples_seen"),
                    "residual": residual,
                }
            )
        points += [{"family": family, **asdict(point)} for point in law.points]
        for point in law.curve:
            low, high = point.interval
            curve.append(
                {
                    "family": family,
                    "compute": point.compute,
                    "error": point.error,
                    "low": low,
                    "high": high,
                }
            )
    *files, tex = paths(stem)
    for path, rows in zip(files, (runs, points, curve), strict=True):
        run_table.write(RunTable(rows), path)
    write_whole(tex, latex({family: law.parameters for family, law in result.laws.items()}))
    return [str(path) for path in paths(stem)]


def latex(families: Mapping[str, Mapping[str, Parameter]]) -> str:
    """Return a booktabs table of laws' parameters: a line per family, with 95% intervals."""
    names = list(next(iter(families.values())))  # all laws have the same form
    lines = [["Runs", *(f"${SYMBOLS[name]}$" for name in names)]]
    for family, parameters in families.items():
        title = re.sub(r"([&%$#_{}])", r"\\\1", family or "all runs")
        lines.append([title, *(_cell(parameters[name]) for name in names)])
    head, *body = (" & ".join(line) + r" \\" for line in lines)
    return "\n".join(
        [
            r"\begin{tabular}{l" + "c" * len(names) + "}",
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


def _cell(parameter: Parameter) -> str:
    """Format a value with its interval; a dash if the runs do not determine it."""
    if parameter.value is None:
        return "--"
    value, low, high = map(_in_tex, (parameter.value, *parameter.interval))
    return f"${value}$ $[{low}, {high}]$"


def _in_tex(number: float) -> str:
    return re.sub(r"e([+-]\d+)", lambda x: rf" \times 10^{{{int(x[1])}}}", f"{number:.4g}")
