"""Write a fit for a paper: CSV files of its runs, points and band, and a LaTeX table of its law."""

import re
from collections.abc import Mapping
from typing import Any

from clip_jax.scaling import run_table
from clip_jax.scaling.run_table import RunTable, number, text
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
    "fade": "R",
    "negatives": "G",
    "steps": "S",
}
ENDINGS = ("_runs.csv", "_points.csv", "_curve.csv", ".tex")


def paths(stem: AnyPath) -> list[AnyPath]:
    """Return the paths of the four files that `write` writes."""
    return [stem.with_name(stem.name + ending) for ending in ENDINGS]


def write(result: Mapping[str, Any], tables: Mapping[str, RunTable], stem: AnyPath) -> list[str]:
    """Write what `fit` returned; return the paths of the files.

    `tables` has the fitted runs by family, with the only key "" for one law. The files are
    `STEM_runs.csv` (runs and their relative residuals), `STEM_points.csv` (the points of the fit),
    `STEM_curve.csv` (the law with its 95% band over compute) and `STEM.tex` (the parameters).
    """
    laws = result.get("families") or {"": result}
    runs, points, curve = [], [], []
    for name, law in laws.items():
        for row, residual in zip(tables[name].rows, law["residuals"], strict=True):
            kept = {x: text(row, x) for x in ("arch", "samples_seen", "seed", result["metric"])}
            compute = number(row, "gmacs_per_sample") * number(row, "samples_seen")
            runs.append({"family": name, **kept, "compute": compute, "residual": residual})
        points += [{"family": name, **point} for point in law["points"]]
        for at in law["curve"]:
            band = dict(zip(("low", "high"), at["interval"], strict=True))
            curve.append({"family": name, "compute": at["compute"], "error": at["error"], **band})
    *files, tex = paths(stem)
    for path, rows in zip(files, (runs, points, curve), strict=True):
        run_table.write(RunTable(rows), path)
    write_whole(tex, latex(laws))
    return [str(path) for path in paths(stem)]


def latex(laws: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a booktabs table: a line per law, its parameters with their 95% intervals."""
    names = list(next(iter(laws.values()))["parameters"])  # all laws have the same form
    lines = [["Runs", *(f"${SYMBOLS[name]}$" for name in names)]]
    for family, law in laws.items():
        title = re.sub(r"([&%$#_{}])", r"\\\1", family or "all runs")
        lines.append([title, *(_parameter(law["parameters"][name]) for name in names)])
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


def _parameter(parameter: Mapping[str, Any]) -> str:
    """Format a value with its interval; a dash if the runs do not determine it."""
    if parameter["value"] is None:
        return "--"
    value, low, high = (
        re.sub(r"e([+-]\d+)", lambda x: rf" \times 10^{{{int(x[1])}}}", f"{number:.4g}")
        for number in (parameter["value"], *parameter["interval"])
    )
    return f"${value}$ $[{low}, {high}]$"
