"""Fit scaling laws to a table of runs, and predict from them.

The unit of compute is Cherti et al.'s: forward GMACs of one image-text pair × pairs seen. Budgets
are in training FLOPs, 6e9 times that.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clip_jax.errors import InputError, check_ranges
from clip_jax.scaling import compare, papers, plots, run_table
from clip_jax.scaling.laws import BINS, Additive, Batched, Law, PowerLaw, Runs, pareto
from clip_jax.scaling.run_table import (
    MOST_FLOPS,
    RunTable,
    Selection,
    is_score,
    short,
    text,
)
from clip_jax.scaling.uncertainty import Fit, Form, Prediction, Procedure, fit_law, middle, sizes_of
from clip_jax.storage.files import AnyPath, check_destination

THIRD = {"repeated": "unique_samples", "batched": "global_batch"}  # third columns that forms need
ENOUGH = 7  # points of different size or samples, for the form additive by default
AXES = {  # of laws of compute alone: the column, and its meaning
    "compute": ("", "forward GMACs of a pair x pairs seen"),
    "samples": ("samples_seen", "pairs seen"),
    "hours": ("seconds/total", "hours"),
    "training_flops": ("training_flops", "training FLOPs"),
    "student_flops": ("student_flops", "training FLOPs without the teacher's"),
}
EXTRAPOLATION = 10.0  # multiple of the largest compute above which predictions get a warning

# Cherti et al. 2023, figures 1 and 2: alpha and beta, drawn in plots of the same metric.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "imagenet1k_acc1": {"LAION": (-0.1114, 5.858), "OpenAI": (-0.1638, 23.18)},
    "imagenet_robustness_acc1": {"LAION": (-0.1255, 11.61), "OpenAI": (-0.2378, 211.7)},
    "mscoco_captions_img_r5": {"LAION": (-0.0794, 2.750), "OpenAI": (-0.0508, 1.589)},
    "flickr30k_img_r5": {"LAION": (-0.1892, 15.51), "OpenAI": (-0.1028, 2.208)},
}


KINDS = ("data", "upstream_dataset", "schedule", "family", "teacher")
# Columns that tell runs apart that are more than seeds of each other, and those of which a law
# without them may misfit.
SETTINGS = (
    "arch",
    "samples_seen",
    "gmacs_per_sample",
    "unique_samples",
    "lr",
    "global_batch",
    "warmup",
    "weight_decay",
    *KINDS,
)
OTHERS = ("global_batch", "unique_samples")


@dataclass(frozen=True, kw_only=True)
class FitConfig(Selection):
    """Fit a scaling law to a table of runs."""

    metric: str = "imagenet1k_acc1"  # Column with the result of each run.
    # What the metric is. score: the law describes the error 1 − metric. error: the metric itself.
    # None: error if its name contains loss, info_nce or perplexity, else score.
    metric_is: Literal["score", "error"] | None = None
    # Form of the law, for compute C, model size N and samples D. power: β·C^α. saturating:
    # E∞ + A(C+B)^−α. additive: E∞ + A·N^−a + B·D^−b. repeated: additive, for several epochs over
    # the samples in column unique_samples. batched: additive, with a best batch size, for batch
    # sizes in global_batch. None: additive if the runs have three sizes and three numbers of
    # samples each, else power.
    form: Form | None = None
    # Quantity that C is, for the forms power and saturating. hours is the column seconds/total. The
    # others are columns: training_flops includes a teacher's, student_flops does not.
    against: Literal["compute", "samples", "hours", "training_flops", "student_flops"] = "compute"
    # Column that divides runs into families, such as family, schedule or data. Fits a law to each
    # family and compares them. None: one law for all runs.
    compare: str | None = None
    # Points to fit. all: every run. frontier: the runs that no other beats with at most their
    # compute. cherti: the lowest error of each of 5 bins of compute, at its centre (Cherti et al.
    # 2023). laion: the best runs along compute, with a robust loss (arXiv:2506.04598).
    procedure: Procedure = "all"
    bins: int = BINS  # Number of bins of the procedure cherti, equally wide in log C.
    draws: int = 1_000  # Number of bootstrap draws, for comparisons and published procedures.
    # Column that names runs: several rows of a run are its checkpoints, whose errors are
    # correlated. None: every row is a run.
    run: str | None = None
    # Number of images or pairs that each score was measured on, for its binomial noise. None: the
    # noise is estimated from the scatter of the runs alone.
    evaluated: int | None = None
    # Conditions, as those of where, of runs to predict from all others, such as arch=ViT-H-14 or
    # samples_seen>=30B. Empty: fit all.
    hold_out: tuple[str, ...] = ()
    # Runs to predict, as MODEL@SAMPLES, such as ViT-L-14@12.8B; append /UNIQUE for the form
    # repeated, or /BATCH for batched.
    predict: tuple[str, ...] = ()
    # Also print the answer for other forms, procedures and bins, and without the smallest runs or
    # one of the sizes: the first run to predict, or else ten times the largest compute.
    sensitivity: bool = False
    plot: AnyPath | None = None  # Path without suffix of the .svg and .png plot. None: no plot.

    def __post_init__(self) -> None:
        check_ranges(self, bins="[3, 10000]", draws="[100, 1000000]", evaluated="[2, inf)")
        if self.compare and (self.predict or self.sensitivity or self.hold_out or self.plot):
            raise InputError(
                "compare fits several laws; remove it, or hold_out, predict, sensitivity and plot."
            )

    @property
    def is_score(self) -> bool:
        return is_score(self.metric, self.metric_is)

    def runs(self, table: RunTable) -> Runs:
        """Convert rows to runs, with what tells them apart."""
        third = THIRD.get(self.form or "", "")
        runs = table.runs(self.metric, self.is_score, third)
        if column := AXES[self.against][0]:
            table.check(column)
            axis = table.bounded(column, most=MOST_FLOPS) / (3600 if self.against == "hours" else 1)
            runs = runs._replace(size=np.ones_like(axis), samples=axis)
        setting = [" ".join(text(row, name) for name in SETTINGS) for row in table.rows]
        known = (x for x in OTHERS if x != third and all(text(row, x) for row in table.rows))
        others = [table.bounded(x) for x in known if table.numbers(x).min() != 0]
        for names in (np.array([text(row, kind) for row in table.rows]) for kind in KINDS):
            others += [np.where(names == name, math.e, 1.0) for name in np.unique(names)[1:]]
        if self.run:
            table.check(self.run)
        return runs._replace(
            setting=np.array(setting),
            others=np.stack(others, axis=-1) if others else None,
            run=np.array([text(row, self.run) for row in table.rows]) if self.run else None,
            known=(1 - runs.error) / (runs.error * self.evaluated) if self.evaluated else None,
        )

    def resolved(self, families: Sequence[RunTable]) -> "FitConfig":
        """Return the config with a form: `additive` if all families determine it, else `power`."""
        if self.form is not None:
            return self
        divides = self.procedure == "all" and self.against == "compute"
        for runs in map(self.runs, families):
            points = {*zip(runs.size.tolist(), runs.samples.tolist(), strict=True)}
            three = min(runs.values("size"), runs.values("samples")) >= 3
            divides = divides and three and len(points) >= ENOUGH
        return replace(self, form="additive" if divides else "power")

    def fit(self, runs: Runs, family: int = 0) -> Fit:
        """Fit runs; each family has its own bootstrap seed, so that they are independent."""
        form, procedure = self.form or "power", self.procedure
        return fit_law(form, runs, procedure, bins=self.bins, draws=self.draws, seed=family)


@dataclass(frozen=True, kw_only=True)
class FitCommand(FitConfig):
    """Fit a scaling law to a table of runs."""

    table: AnyPath = Path("scaling.csv")  # Table of runs (CSV), as written by `scale collect`.
    also: tuple[str, ...] = ()  # More metrics to fit in the same way, each with its own law.
    # Path without ending of files for papers: runs, points and curve as CSV, the law as a LaTeX
    # table. None: none.
    output: AnyPath | None = None


def fit_file(command: FitCommand) -> dict[str, Any]:
    """Run `fit` on the table in a file, and write what the command asks for."""
    for flag, stem in (("plot", command.plot), ("output", command.output)):
        if stem is not None and not stem.name:
            raise InputError(f"{flag}={str(stem)!r} has no name; set a path such as paper.")
    for path in plots.both(command.plot) if command.plot else ():
        check_destination(path, "--plot", folder=False)
    for path in papers.paths(command.output) if command.output else ():
        check_destination(path, "--output", folder=False)
    table = run_table.read(command.table, command.columns)
    result = fit(table, command)
    if command.output:
        rows = table.select(command.metric, command.where)
        column = command.compare
        tables = rows.groups(lambda row: family_of(row, column)) if column else {"": rows}
        result["files"] = papers.write(result, tables, command.output)
    result["also"] = [
        fit(table, replace(command, metric=metric, metric_is=None, plot=None))
        for metric in command.also
    ]
    return result


def fit(table: RunTable, config: FitConfig) -> dict[str, Any]:
    """Fit laws and predict with them; returns JSON values (`describe` formats them as text).

    Keys: `alpha`, `beta` (power law), `parameters` with intervals (a value of None is not
    determined, and `lacking` says which runs would determine it), `irreducible_error`, the fitted
    `points`, the law's `curve` at the best division of compute, `residuals` in the order of the
    table, `optimal` (best divisions of compute, for laws in N and D), `hold_out`, `predictions` by
    run, `sensitivity`, `warnings`. With `compare`: `families` by name, each with the keys of a law,
    and `pairs` of families.
    """
    table = table.select(config.metric, config.where)
    if config.compare:
        table.check(column := config.compare)
        families = dict(sorted(table.groups(lambda row: family_of(row, column)).items()))
        config = config.resolved([*families.values()])
    else:
        config = config.resolved([table])
    result: dict[str, Any] = {
        "metric": config.metric,
        "form": config.form,
        "procedure": config.procedure,
        "compute_unit": AXES[config.against][1],
        "warnings": [],
    }
    if config.compare:
        return result | _compare(families, config)
    runs = config.runs(table)
    fitted = config.fit(runs)
    result |= _law(fitted)
    result["warnings"] = fitted.misfit()
    if config.hold_out:
        result["hold_out"] = _hold_out(table, config)
    largest = runs.compute.max()
    predicted: dict[str, tuple[float, Prediction]] = {}
    result["predictions"] = {}
    for wanted in config.predict:
        run = _run_of(wanted, table, config)
        compute, answer = run[0] * run[1], _answer(fitted, *run, config)
        result["predictions"][wanted] = {"compute": compute, **answer}
        if answer["error"] is not None:
            interval = answer["error_interval"]
            predicted[wanted] = compute, Prediction(answer["error"], *interval)
        if compute > EXTRAPOLATION * largest:
            result["warnings"].append(
                f"{wanted} has {compute / largest:.0f} times the compute of the largest run; the "
                "interval assumes that the law still holds there."
            )
    if config.sensitivity:
        result["sensitivity"] = _sensitivity(table, runs, config)
    if config.plot:
        page = plots.figure(
            fitted,
            others=published(config.metric),
            predictions=predicted,
            error_label=f"1 − {config.metric}" if config.is_score else config.metric,
            reach=1.6 * max([largest, *(compute for compute, _ in predicted.values())]),
            title="The law misfits these runs: see the warnings." if fitted.misfit() else "",
        )
        result["plots"] = [str(path) for path in plots.save(page, config.plot)]
    return result


def published(metric: str) -> dict[str, Law]:
    """Return Cherti et al.'s laws for a metric, by their models; empty for other metrics."""
    return {
        f"{models} (Cherti et al.)": PowerLaw(alpha, beta)
        for models, (alpha, beta) in PUBLISHED.get(metric, {}).items()
    }


def _law(fitted: Fit) -> dict[str, Any]:
    """Return the keys of `fit` that describe one law."""
    law, runs = fitted.law, fitted.runs
    span = np.geomspace(runs.compute.min() / 1.6, 1.6 * runs.compute.max(), 60)
    largest = float(runs.size.max())
    three = min(fitted.fitted.values("size"), fitted.fitted.values("samples")) > 2
    known = sizes_of([fitted]) if three or not isinstance(law, Additive) else (largest, largest)
    best = law.optimum(span, known)
    curve = np.stack([span, *fitted.curve(best.size, best.samples)])
    parameters = {
        name: {
            "value": None if (lacking := fitted.lacking(name)) else float(value),
            "interval": list(fitted.interval(name)[:2]),
            "lacking": lacking or None,
        }
        for name, value in law.parameters.items()
    }
    result: dict[str, Any] = {
        "runs": len(runs.error),
        "points": [
            {"compute": compute, "error": error}
            for compute, error in np.stack([fitted.fitted.compute, fitted.fitted.error]).T.tolist()
        ],
        "parameters": parameters,
        "irreducible_error": parameters.get("irreducible", {}).get("value"),
        "curve": [
            {"compute": compute, "error": error, "interval": interval}
            for compute, error, *interval in curve.T.tolist()
        ],
        "residuals": (runs.error / runs.under(law) - 1).tolist(),
    }
    if isinstance(law, PowerLaw):
        result |= {name: float(value) for name, value in law.parameters.items()}

    def drawn(get: Callable[[Any], Any]) -> dict[str, Any]:
        return {"value": float(get(law)), "interval": list(map(float, middle(get(fitted.drawn))))}

    if isinstance(law, Batched) and not (fitted.lacking("negatives") or fitted.lacking("steps")):
        samples = float(np.median(runs.samples))
        result["best_batch"] = {"samples": samples, **drawn(lambda law: law.best_batch(samples))}
    if isinstance(law, Additive) and three:
        result["optimal"] = {"size_exponent": drawn(lambda law: law.size_exponent)}
    return result


def _hold_out(table: RunTable, config: FitConfig) -> dict[str, Any]:
    """Fit the runs that are not held out and predict those that are.

    A fit through the frontier describes only the best runs, so it predicts only held-out runs that
    no other run beats with at most their compute. Raises InputError if there are none.
    """
    runs, held = config.runs(table), np.array(table.meets(config.hold_out))
    test = runs.where(held & pareto(runs) if config.procedure != "all" else held)
    answers, fitted = [], None if held.all() else config.fit(runs.where(~held))
    third = [None] * len(test.error) if test.third is None else test.third
    columns = np.asarray(test.model), test.error, test.size, test.samples, third
    for model, error, *run in zip(*columns, strict=True):
        if fitted and (answer := _answer(fitted, *run, config))["error"] is not None:
            of = {"model": str(model), "samples": float(run[1]), "measured": float(error)}
            answers.append(of | answer)
    if not answers:
        raise InputError(
            f"nothing to predict: of {len(held)} runs, {held.sum()} are held out, and none of "
            f"these can be tested; change hold_out={list(config.hold_out)}."
        )
    error, measured, low, high = np.array(
        [(x["error"], x["measured"], *x["error_interval"]) for x in answers]
    ).T
    return {
        "fitted": int((~held).sum()),
        "mean_relative_error": float(np.abs(error / measured - 1).mean()),
        "inside_interval": int(((low <= measured) & (measured <= high)).sum()),
        "runs": answers,
    }


def _run_of(wanted: str, table: RunTable, config: FitConfig) -> tuple[float, float, float | None]:
    """Read MODEL@SAMPLES or MODEL@SAMPLES/THIRD."""
    model, at, samples = wanted.rpartition("@")
    if not at:
        raise InputError(f"predict={wanted!r} must be MODEL@SAMPLES, such as ViT-L-14@12.8B.")
    if config.against not in ("compute", "samples"):
        raise InputError(f"predict needs a law of compute or samples, not of {config.against}.")
    samples, slash, third = samples.partition("/")
    size = table.size_of(model)
    size = 1.0 if config.against == "samples" else size
    return size, run_table.parse_count(samples), run_table.parse_count(third) if slash else None


def _answer(
    fitted: Fit, size: float, samples: float, third: float | None, config: FitConfig
) -> dict[str, Any]:
    """Return an error with its interval and, if the metric is a score, the score with its own.

    Both are None where the runs do not determine them.
    """
    if third is None and isinstance(fitted.law, Batched):
        third = float(fitted.law.batch_to_use(samples))
    if lacking := fitted.unknown(size, samples, third):
        return {"error": None, "lacking": lacking} | ({"score": None} if config.is_score else {})
    prediction = fitted.predict(size, samples, third)
    most = 1.0 if config.is_score else math.inf  # an error of 1 − score is at most 1
    error, low, high = (min(float(value), most) for value in prediction)
    both: dict[str, Any] = {"error": error, "error_interval": [low, high]}
    score = {"score": 1 - error, "score_interval": [1 - high, 1 - low]}
    return both | (score if config.is_score else {})


def _sensitivity(table: RunTable, runs: Runs, config: FitConfig) -> list[dict[str, Any]]:
    """Return the answer of each variant of a fit: its name, the prediction, and its warnings."""
    answers = []
    for name, variant, keep in _variants(runs, config):
        try:
            rows = RunTable([row for row, kept in zip(table.rows, keep, strict=True) if kept])
            fitted = variant.fit(variant.runs(rows))
            if config.predict:
                at = _run_of(config.predict[0], table, variant)
            else:
                compute = EXTRAPOLATION * runs.compute.max()
                best = fitted.law.optimum(compute, sizes_of([fitted]))
                at = float(best.size), float(best.samples), None
            answer = _answer(fitted, *at, variant) | {"warnings": fitted.misfit()}
        except InputError as error:
            answer = {"error": None, "lacking": "other runs", "reason": str(error), "warnings": []}
        answers.append({"variant": name, **answer})
    return answers


def _variants(runs: Runs, config: FitConfig) -> Iterator[tuple[str, FitConfig, np.ndarray]]:
    """Yield a name, a config and which runs to keep, for each variant of a fit."""
    every = np.ones(len(runs.error), bool)
    yield "as asked", config, every
    forms: tuple[Form, ...] = ("power", "saturating", "additive")
    for form in forms:
        if form != config.form and not (form == "additive" and config.against != "compute"):
            yield f"form {form}", replace(config, form=form, procedure="all"), every
    line = replace(config, form="power")
    yield "frontier", replace(line, procedure="frontier"), every
    for bins in (3, 5, 10, 30):
        yield f"cherti, {bins} bins", replace(line, procedure="cherti", bins=bins), every
    yield "laion", replace(line, procedure="laion"), every
    for share in (0.1, 0.25):
        least = np.quantile(runs.compute, share)
        yield f"without the smallest {share:.0%}", config, runs.compute >= least
    for model in dict.fromkeys(np.asarray(runs.model).tolist()):
        yield f"without {model}", config, np.asarray(runs.model) != model


# ------------------------------------------------------------------ comparison of families


def family_of(row: run_table.Row, column: str) -> str:
    """Return the name of a row's family: its text in a column."""
    return text(row, column) or f"no {column}"


def _compare(groups: Mapping[str, RunTable], config: FitConfig) -> dict[str, Any]:
    """Fit every family of runs separately, and compare every pair."""
    families: dict[str, Fit] = {}
    warnings = []
    for seed, (name, members) in enumerate(groups.items()):
        try:
            families[name] = config.fit(config.runs(members), seed)
            warnings += [f"{name}: {line}" for line in families[name].misfit()]
        except InputError as error:
            warnings.append(f"{name} is left out: {error}")
    if len(families) < 2:
        raise InputError(
            f"compare={config.compare!r} needs two or more families that can be fitted, not "
            + "; ".join([*families, *warnings])
            + "."
        )
    pairs = []
    for names in combinations(families, 2):
        first, second = (families[name] for name in names)
        alike = compare.paired(*(groups[x] for x in names), (first.runs.error, second.runs.error))
        pairs.append(compare.as_json(names, compare.compare(first, second), alike))
    return {
        "compare": config.compare,
        "families": {name: _law(fitted) for name, fitted in families.items()},
        "pairs": pairs,
        "warnings": warnings,
    }


# ------------------------------------------------------------------ for a terminal


def describe(result: Mapping[str, Any]) -> str:
    """Format the result of `fit` as text."""
    law = f"{result['metric']}: {result['form']} law"
    unit = f"; C in {result['compute_unit']}"
    lines = [law + unit] if "families" in result else []
    for name, family in result.get("families", {"": result}).items():
        count = f"{len(family['points'])} points of {family['runs']} runs"
        lines += [f"{name or law} through {count}{'' if name else unit}", *_lines_of_law(family)]
    for pair in result.get("pairs", ()):
        lines += compare.describe(pair)
    if "hold_out" in result:
        held = result["hold_out"]
        lines.append(
            f"held-out runs: {len(held['runs'])}, predicted from {held['fitted']} others, off by "
            f"{held['mean_relative_error']:.1%} on average, {held['inside_interval']} inside the "
            "95% interval"
        )
        for x in held["runs"][:10]:
            score, form = ("score" in x, ".1%" if "score" in x else ".4g")
            measured = format(1 - x["measured"] if score else x["measured"], form)
            of = f"{x['model']}@{short(x['samples'])}"
            lines.append(f"  {of}: {_in_words(x)}, measured {measured}")
    for wanted, prediction in result.get("predictions", {}).items():
        lines.append(f"{wanted}: {_in_words(prediction)}")
    if "sensitivity" in result:
        lines.append("the same answer by other ways to fit:")
    for x in result.get("sensitivity", ()):
        mark = "; MISFITS or leaves out points" if x["warnings"] else ""
        lines.append(f"  {x['variant']:25} {_in_words(x)}{mark}")
    written = (*result.get("plots", ()), *result.get("files", ()))
    lines += [f"written: {path}" for path in written]
    lines += [f"warning: {line}" for line in result["warnings"]]
    return "\n".join([*lines, *map(describe, result.get("also", ()))])


def _lines_of_law(family: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, parameter in family["parameters"].items():
        line = f"  {name:13} "
        if (lacking := parameter["lacking"]) is None:
            line += f"{parameter['value']:<10.4g} {_interval(parameter['interval'], '.4g')}"
        elif lacking.startswith("runs"):
            line += f"not determined; it takes {lacking}"
        else:
            line += f"not determined {_interval(parameter['interval'], '.4g')}; it takes {lacking}"
        lines.append(line)
    if best := family.get("best_batch"):
        value = f"{best['value']:.3g} {_interval(best['interval'], '.3g')}"
        lines.append(f"  best batch size for {short(best['samples'])} pairs: {value}")
    if "optimal" in family:
        exponent = family["optimal"]["size_exponent"]
        value = f"{exponent['value']:.2f} {_interval(exponent['interval'], '.2f')}"
        lines.append(f"  best division of compute: N grows as C^{value}")
    return lines


def _interval(interval: Sequence[float], form: str) -> str:
    low, high = interval
    return f"(95%: {low:{form}} to {high:{form}})"


def _in_words(prediction: Mapping[str, Any]) -> str:
    if prediction["error"] is None:
        return f"not determined; it takes {prediction['lacking']}"
    name, form = ("score", ".1%") if "score" in prediction else ("error", ".4g")
    return f"{prediction[name]:{form}} {_interval(prediction[f'{name}_interval'], form)}"
