"""Write a fit for a paper: CSV files of its runs, points and band, and a LaTeX table of its law."""

import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from clip_jax.scaling.run_table import RunTable, number, text
from clip_jax.storage.files import AnyPath, write_whole

SYMBOLS = {  # of the parameters, as in the documentation's table of laws
    "alpha": r"\alpha", "beta": r"\beta", "scale": "A", "offset": "B", "irreducible": r"E_\infty",
    "size_alpha": "a", "samples_alpha": "b", "size_scale": "A", "samples_scale": "B", "fade": "R",
}  # fmt: skip
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
    metric, runs, points, curve = result["metric"], [], [], []
    for name, law in laws.items():
        for row, residual in zip(tables[name].rows, law["residuals"], strict=True):
            samples, size = number(row, "samples_seen"), number(row, "gmacs_per_sample")
            what = (row["arch"], f"{samples:.12g}", text(row, "seed"))
            runs.append((name, *what, size * samples, text(row, metric), residual))
        points += [(name, point["compute"], point["error"]) for point in law["points"]]
        curve += [(name, at["compute"], at["error"], *at["interval"]) for at in law["curve"]]
    contents = (
        _csv(("family", "arch", "samples_seen", "seed", "compute", metric, "residual"), runs),
        _csv(("family", "compute", "error"), points),
        _csv(("family", "compute", "error", "low", "high"), curve),
        latex(laws),
    )
    for path, content in zip(paths(stem), contents, strict=True):
        write_whole(path, content)
    return [str(path) for path in paths(stem)]


def latex(laws: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a booktabs table: a line per law, its parameters with their 95% intervals."""
    names = list(dict.fromkeys(name for law in laws.values() for name in law["parameters"]))
    heads = [f"${SYMBOLS[name]}$" if name in SYMBOLS else _escaped(name) for name in names]
    lines = [
        [_escaped(family or "all runs"), *(_parameter(law["parameters"].get(x)) for x in names)]
        for family, law in laws.items()
    ]
    body = [" & ".join(line) + r" \\" for line in (["Runs", *heads], *lines)]
    return "\n".join([
        r"\begin{tabular}{l" + "c" * len(names) + "}", r"\toprule", body[0], r"\midrule", *body[1:],
        r"\bottomrule", r"\end{tabular}", "",
    ])  # fmt: skip


def _parameter(parameter: Mapping[str, Any] | None) -> str:
    """Format a value with its interval; a dash if the runs do not determine it."""
    if not parameter or parameter["value"] is None:
        return "--"
    value, low, high = (
        re.sub(r"e([+-]\d+)", lambda x: rf" \times 10^{{{int(x[1])}}}", f"{number:.4g}")
        for number in (parameter["value"], *parameter["interval"])
    )
    return f"${value}$ $[{low}, {high}]$"


def _escaped(name: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", name)


def _csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([columns, *rows])
    return file.getvalue()
