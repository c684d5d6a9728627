"""Write an HTML report of runs: results, laws, residuals, curves, costs and failures.

The report is one file with data, style and script: it needs no server and loads nothing.
"""

import contextlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clip_jax.checkpoints.claim import is_locked
from clip_jax.checkpoints.resume import branch_point
from clip_jax.checkpoints.run_config import upgrade
from clip_jax.clock import CLOCK
from clip_jax.errors import InputError
from clip_jax.scaling import collect
from clip_jax.scaling.fit import FitConfig, family_of, fit
from clip_jax.scaling.fit_result import describe
from clip_jax.scaling.forecast import OF_COMPUTE
from clip_jax.scaling.links import LinkName, link_of
from clip_jax.scaling.queue import workers
from clip_jax.scaling.run_table import Row, RunTable, Selection, is_score, number, short, text
from clip_jax.scaling.uncertainty import Form, Procedure, fit_law
from clip_jax.serialize import to_json
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath, as_path
from clip_jax.storage.json_files import content_of, parse, read_rows

POINTS = 240  # maximum number of points per curve, evenly spaced
CURVES = ("loss", "grad_norm", "logit_scale", "images_per_second")  # drawn besides the metric
RESULT = re.compile(r"acc|top\d|recall|_r\d|info_nce|cider|bleu")  # names of evaluation metrics
# What the law that the page draws over compute describes.
BEST = "The law describes the best runs for their compute; others lie above it."
ALL = "The law describes all runs. A band is a 95% interval."
DIVIDED = """The line is the law at the best division of compute between size and samples. Runs
divided otherwise lie above it; their deviation is from the law at their own size."""
# Last log line of a failed run; others were killed or are running elsewhere.
FAILURE = re.compile(r"clip-jax: (?!stopped by SIG)|\w+(Error|Exception|Diverged)\b")


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Selection):
    """Write an HTML report of runs, which opens without a server."""

    paths: tuple[AnyPath, ...] = (Path("runs"),)  # Run directories, folders of these, or tables.
    output: AnyPath = Path("report.html")  # HTML file to write.
    metric: str | None = None  # Metric of the plots and laws. None: the first evaluated, or loss.
    # What the metric is. None: error if its name contains loss, info_nce or perplexity, else score.
    metric_is: Literal["score", "error"] | None = None
    form: Form | None = None  # Form of the law, as in `scale fit`. None: the runs decide.
    procedure: Procedure = "all"  # Points to fit, as in `scale fit`.
    compare: str | None = None  # Column that divides runs into families, each with its own law.


def report(config: ReportConfig) -> dict[str, Any]:
    """Write the report; return its path, the number of runs by status, and the summary."""
    files.check_destination(config.output, "--output", folder=False)
    table, skipped = collect.gather(config.paths, config.columns)
    finished = {str(row["source"]): row for row in table.rows}
    metric = config.metric or next(filter(RESULT.search, table.columns), "loss")
    is_a_score = is_score(metric, config.metric_is)
    folders = {str(folder): folder for folder in _folders(config.paths)}
    claims = {x.parent: workers(x.parent, CLOCK.unix()) for x in folders.values()}
    by_row: dict[int | str, dict[str, Any]] = {}  # unfinished runs by their folders
    for name, folder in folders.items():
        row = finished.get(name)
        worker = claims[folder.parent].get(folder.name, "")
        by_row[id(row) if row else name] = _run(folder, row, metric, worker)
    by_row |= {id(row): _shown(row) for row in table.rows if str(row["source"]) not in folders}
    runs = list(by_row.values())
    if not runs:
        raise InputError(f"no run under {', '.join(map(str, config.paths))}; name runs or tables.")
    table = RunTable([row for row in table.rows if id(row) in by_row])  # without duplicates
    for row in table.rows:
        if text(row, metric):
            value = number(row, metric)
            by_row[id(row)]["error"] = 1 - value if is_a_score else value
    options = FitConfig(
        metric=metric,
        metric_is="score" if is_a_score else "error",
        where=config.where,
        form=config.form,
        procedure=config.procedure,
        compare=config.compare,
    )
    laws, summary, validation = _laws(table, options, by_row)
    data = {
        "title": ", ".join(map(str, config.paths)),
        "compare": config.compare or "arch",
        "metric": f"1 − {metric}" if is_a_score else metric,
        "runs": runs,
        "laws": laws,
        "validation": validation,
        "summary": summary,
        "left_out": [line for line in skipped if not line.startswith(tuple(folders))],
    }
    files.write_whole(config.output, page(data))
    status = Counter(run["status"] for run in runs)
    return {"page": str(config.output), "runs": status, "metric": metric, "summary": summary}


def page(data: Mapping[str, Any]) -> str:
    """Insert data into the page, escaped so that no text ends its script; NaN becomes null."""
    template = Path(__file__).with_name("html_report.html").read_text(encoding="utf-8")
    return template.replace("{{data}}", to_json(data).replace("<", "\\u003c"))


def _folders(paths: Sequence[AnyPath]) -> list[AnyPath]:
    """Find the run directories, also those of unfinished runs."""
    walked = (as_path(x) for path in paths if path.is_dir() for x in files.walk(path))
    return sorted({x.parent for x in walked if x.name == "config.json"}, key=str)


def _run(folder: AnyPath, finished: Row | None, metric: str, worker: str) -> dict[str, Any]:
    """Return the data that the page shows of a run directory, which `worker` may be training."""
    config = upgrade(_content(folder / "config.json"))
    result = _content(folder / "result.json")
    step = result.get("step", 0)
    steps = config.get("steps", 0)
    try:
        row = finished or collect.of_run(config, step) | result
    except (LookupError, TypeError, ValueError):
        row = {"arch": "unknown", "samples_seen": 0}
    log = folder / "log.txt"
    output = log.read_bytes().decode(errors="replace").strip() if log.exists() else ""
    words = ["", *output.splitlines()][-1][:500]
    branch, first = branch_point(config["branch_from"]) if config.get("branch_from") else ("", 0)
    if finished:
        status, words = "done", ""
    elif worker or is_locked(folder):
        status, words = "running", worker or words
    elif reason := result.get("failed"):
        status, words = "failed", reason
    elif FAILURE.match(words):
        status = "failed"
    else:
        status = "stopped" if step or (folder / "checkpoints").exists() else "not begun"
    return _shown(row) | {
        "name": folder.name,
        "folder": str(folder),
        "status": status,
        "words": words,
        "step": step,
        "steps": steps,
        "first": first,
        "parent": Path(branch).name,
        "curves": _curves(folder, (*CURVES, metric)),
    }


def _content(path: AnyPath) -> dict[str, Any]:
    """Return the JSON object in a file; empty if the file is missing or damaged."""
    return (parse(content_of(path)) if path.exists() else None) or {}


def _shown(row: Row) -> dict[str, Any]:
    """Return the data that the page shows of a row of a table."""
    numbers = "samples_seen gmacs_per_sample training_flops flops_spent seconds/total goodput"
    samples = f"@{short(number(row, 'samples_seen'))}" if text(row, "samples_seen") else ""
    return {
        "name": row.get("name") or row["arch"] + samples,
        "folder": str(row.get("source", "")),
        "status": "done",
        "words": "",
        "curves": {},
        **{name: number(row, name) for name in numbers.split() if text(row, name)},
        "row": {name: str(value) for name, value in row.items() if value is not None},
    }


def _curves(folder: AnyPath, names: Sequence[str]) -> dict[str, list[list[float]]]:
    """Read metrics of metrics.jsonl over samples seen, thinned, by name."""
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    samples = 0.0
    for row in read_rows(folder / "metrics.jsonl"):
        samples = row.get("samples_seen", samples)
        for name, curve in curves.items():
            value = row.get(name)
            if isinstance(value, int | float) and abs(value) < math.inf:
                curve.append([samples, value])
    for name, curve in curves.items():
        indices = np.linspace(0, len(curve) - 1, min(len(curve), POINTS)).round().astype(int)
        curves[name] = [[curve[i][0], float(f"{curve[i][1]:.5g}")] for i in indices]
    return {name: curve for name, curve in curves.items() if curve}


def _laws(
    table: RunTable, config: FitConfig, by_row: Mapping[Any, dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str], list[dict[str, Any]]]:
    """Fit the finished runs and store their residuals.

    Returns the laws, a text summary, and the predictions of their validation. If nothing can be
    fitted, the summary has the reason.
    """
    try:
        table = table.select(config.metric, config.where)
        result = fit(table, config)
    except InputError as error:
        return [], [str(error)], []
    laws, column = [], config.compare
    families = table.groups(lambda row: family_of(row, column) if column else config.metric)
    for family, law in result.laws.items():
        name = family or config.metric
        meaning = BEST
        if result.procedure == "all":
            meaning = ALL if result.form in OF_COMPUTE else DIVIDED
        laws.append(
            {
                "name": name,
                "curve": [[point.compute, point.error, *point.interval] for point in law.curve],
                "models": _models(families[name], config, result.link),
                "meaning": meaning,
                "lacking": {x: at.lacking for x, at in law.parameters.items() if at.lacking},
            }
        )
        for row, residual in zip(families[name].rows, law.residuals, strict=True):
            by_row[id(row)]["off"] = residual
    validation = result.validation.to_json()["runs"] if result.validation else []
    return laws, describe(result).splitlines(), validation


def _models(family: RunTable, config: FitConfig, link: LinkName) -> dict[str, list[list[float]]]:
    """Fit a power law of the samples seen to each model that has three or more numbers of them.

    It describes the error on the same scale as the law of all models.
    """
    curves = {}
    for model, rows in family.groups(lambda row: row["arch"]).items():
        runs = config.runs(rows)
        if len({*runs.samples}) > 2:
            samples = np.geomspace(runs.samples.min(), runs.samples.max(), 60)
            with contextlib.suppress(InputError):  # the page shows the model's points only
                law = fit_law("power", runs, "all", link=link_of(link, runs.error))
                curve = law.curve(np.full_like(samples, runs.size[0]), samples)
                curves[model] = np.stack([samples, *curve]).T.tolist()
    return curves
