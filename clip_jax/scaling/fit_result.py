"""The result of `fit`: laws, predictions and comparisons, as JSON values and as text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from clip_jax.scaling import compare
from clip_jax.scaling.compare import FamilyPair
from clip_jax.scaling.links import LinkName
from clip_jax.scaling.run_table import short
from clip_jax.scaling.validation import Group, Validation
from clip_jax.scaling.validation import describe as describe_law


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% interval."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a law with its 95% interval."""

    value: float | None  # None: the runs do not determine it
    interval: tuple[float, float]
    lacking: str | None  # runs that would determine it; None: it is determined


@dataclass(frozen=True)
class FittedPoint:
    """A point that a law was fitted to: the mean of the seeds of a run, or the best of a bin."""

    compute: float
    error: float
    size: float  # forward GMACs of a pair; 1 for a law of another quantity than compute
    samples: float
    third: float | None  # distinct samples or batch size, for the forms that have one
    seeds: float
    weight: float  # of its squared residual of the log on the scale of `link`, 1 on average


@dataclass(frozen=True)
class CurvePoint:
    """A point of a law, with its 95% interval."""

    compute: float
    error: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class BestBatch:
    """The best batch size for a number of samples."""

    samples: float
    value: float
    interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class LawResult:
    """A law that was fitted to runs."""

    runs: int  # number of runs
    points: Sequence[FittedPoint]
    parameters: Mapping[str, Parameter]
    curve: Sequence[CurvePoint]  # the law at the best division of compute
    residuals: Sequence[float]  # of the error, relative, in the order of the table
    noise: float  # standard deviation of the log error of a point of weight 1
    degrees_of_freedom: float
    alpha: float | None = None  # of a power law, also if the runs do not determine it
    beta: float | None = None
    best_batch: BestBatch | None = None
    size_exponent: Estimate | None = None  # of compute, in the best division of compute
    paper: Mapping[str, float] | None = None  # coefficients of the procedure laion, as published

    @property
    def irreducible_error(self) -> float | None:
        """The error that remains with unlimited compute; None if unknown."""
        parameter = self.parameters.get("irreducible")
        return parameter.value if parameter else None

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {
            "runs": self.runs,
            "points": [asdict(point) for point in self.points],
            "parameters": {name: asdict(x) for name, x in self.parameters.items()},
            "irreducible_error": self.irreducible_error,
            "curve": [asdict(point) for point in self.curve],
            "residuals": list(self.residuals),
            "noise": self.noise,
            "degrees_of_freedom": self.degrees_of_freedom,
        }
        if self.alpha is not None:
            values["alpha"] = self.alpha
            values["beta"] = self.beta
        if self.best_batch:
            values["best_batch"] = asdict(self.best_batch)
        if self.size_exponent:
            values["optimal"] = {"size_exponent": asdict(self.size_exponent)}
        if self.paper:
            values["paper"] = dict(self.paper)
        return values


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A predicted error; none if the runs do not determine it."""

    error: Estimate | None
    lacking: str = ""  # runs that would determine the error
    validated: bool = False  # whether the interval is calibrated for this extrapolation
    is_score: bool = False  # whether the metric is 1 − error

    @property
    def metric(self) -> Estimate | None:
        """The predicted metric: the error, or the score."""
        if self.error is None or not self.is_score:
            return self.error
        low, high = self.error.interval
        return Estimate(1 - self.error.value, (1 - high, 1 - low))

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {}
        if self.error is None:
            values["error"] = None
            values["lacking"] = self.lacking
        else:
            values["error"] = self.error.value
            values["error_interval"] = self.error.interval
            values["validated"] = self.validated
        if self.is_score:
            values["score"] = self.metric.value if self.metric else None
        if self.is_score and self.metric:
            values["score_interval"] = self.metric.interval
        return values


@dataclass(frozen=True)
class PredictedRun:
    """A run that `predict` names."""

    compute: float
    answer: Answer

    def to_json(self) -> dict[str, Any]:
        return {"compute": self.compute, **self.answer.to_json()}


@dataclass(frozen=True, kw_only=True)
class WithoutOutliers:
    """The same fit without the points that lie too far from the law to be noise."""

    points: int  # number of points that are left out
    law: LawResult
    predictions: Mapping[str, PredictedRun]

    def to_json(self) -> dict[str, Any]:
        predictions = {name: run.to_json() for name, run in self.predictions.items()}
        return {"points": self.points, "law": self.law.to_json(), "predictions": predictions}


@dataclass(frozen=True, kw_only=True)
class HeldOutRun:
    """A run that was held out, and its prediction from the others."""

    model: str
    samples: float
    measured: float  # its error
    answer: Answer
    settings: Mapping[str, str]  # in which held-out runs differ besides model and samples

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "samples": self.samples,
            "measured": self.measured,
            "settings": dict(self.settings),
            **self.answer.to_json(),
        }


@dataclass(frozen=True, kw_only=True)
class HoldOut:
    """Held-out runs and how well the others predict them."""

    fitted: int  # number of runs that were not held out
    mean_relative_error: float  # of the predicted errors
    inside_interval: int  # number of runs inside of their intervals
    validated: int  # number of runs whose intervals are validated
    warnings: Sequence[str]  # about the fit to the others
    runs: Sequence[HeldOutRun]

    def to_json(self) -> dict[str, Any]:
        return {
            "fitted": self.fitted,
            "mean_relative_error": self.mean_relative_error,
            "inside_interval": self.inside_interval,
            "validated": self.validated,
            "warnings": list(self.warnings),
            "runs": [run.to_json() for run in self.runs],
        }


@dataclass(frozen=True, kw_only=True)
class Variant:
    """The answer by another way to fit."""

    name: str
    answer: Answer
    warnings: Sequence[str] = ()
    reason: str = ""  # why this fit is impossible

    def to_json(self) -> dict[str, Any]:
        values = {"variant": self.name, **self.answer.to_json()}
        if self.reason:
            values["reason"] = self.reason
        return values | {"warnings": list(self.warnings)}


@dataclass(frozen=True, kw_only=True)
class ValidatedLaw:
    """A law that validation compared."""

    form: str
    link: str
    off: float  # mean absolute error of its predictions, in logits of the score or log error
    averaged: bool  # whether predictions average it


@dataclass(frozen=True, kw_only=True)
class ValidatedRun:
    """A run that was predicted from the cheaper ones up to a cut."""

    model: str
    cut: int  # number of the cut
    compute: float
    factor: float  # how far it lies beyond the fitted runs in compute, size or samples
    predicted: float  # metric
    measured: float


@dataclass(frozen=True, kw_only=True)
class ValidationSummary:
    """How well cheaper runs predict dearer ones."""

    cuts: int
    is_score: bool
    laws: Sequence[ValidatedLaw]  # those that predictions average first
    groups: Sequence[Group]  # by extrapolation factor
    runs: Sequence[ValidatedRun]

    def to_json(self) -> dict[str, Any]:
        groups = []
        for group in self.groups:
            values = group._asdict()
            values["high"] = group.high if group.high < math.inf else None
            values |= {x: None for x in ("width", "inside") if not group.checked}
            groups.append(values)
        return {
            "cuts": self.cuts,
            "laws": [asdict(law) for law in self.laws],
            "groups": groups,
            "runs": [asdict(run) for run in self.runs],
        }


def summary(validation: Validation) -> ValidationSummary:
    """Return the validation of a table of runs."""
    runs = validation.cuts.runs
    names = np.asarray(runs.model if runs.model is not None else np.full(len(runs.error), ""))
    columns = zip(
        names[validation.run].tolist(),
        validation.cut.tolist(),
        runs.compute[validation.run].tolist(),
        np.exp(validation.factor).tolist(),
        validation.metric(validation.predicted).tolist(),
        validation.metric(validation.measured).tolist(),
        strict=True,
    )
    others = [x for x in validation.offs if x not in validation.chosen]
    others = sorted(others, key=lambda candidate: validation.offs[candidate])
    laws = [
        ValidatedLaw(
            form=candidate.form,
            link=candidate.link.name,
            off=validation.offs[candidate],
            averaged=candidate in validation.chosen,
        )
        for candidate in (*validation.chosen, *others)
        if math.isfinite(validation.offs[candidate])
    ]
    return ValidationSummary(
        cuts=len(np.unique(validation.cut)),
        is_score=validation.is_score,
        laws=laws,
        groups=validation.groups(),
        runs=[
            ValidatedRun(
                model=model,
                cut=cut,
                compute=compute,
                factor=factor,
                predicted=predicted,
                measured=measured,
            )
            for model, cut, compute, factor, predicted, measured in columns
        ],
    )


@dataclass(frozen=True, kw_only=True)
class FitResult:
    """Laws that were fitted to a table, and predictions by them."""

    metric: str
    form: str
    link: LinkName  # scale of the error that the laws describe
    chance: float | None  # metric of random guesses on this scale; None: the scale has none
    procedure: str
    compute_unit: str
    laws: Mapping[str, LawResult]  # by family; with `compare=None`, one by the name ""
    warnings: Sequence[str]
    compare: str | None = None  # column that divides the runs into families
    pairs: Sequence[FamilyPair] = ()  # of families
    validation: ValidationSummary | None = None  # None: the runs are too few
    without_outliers: WithoutOutliers | None = None  # None: there are no outliers
    hold_out: HoldOut | None = None
    predictions: Mapping[str, PredictedRun] = field(default_factory=dict)  # by name of the run
    sensitivity: Sequence[Variant] = ()
    plots: Sequence[str] = ()  # paths that were written
    files: Sequence[str] = ()  # for papers, paths that were written
    also: "Sequence[FitResult] | None" = None  # fits of more metrics. None: of a single fit

    @property
    def law(self) -> LawResult:
        """The law of all runs; with `compare` there is none."""
        return self.laws[""]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values.

        Keys: `alpha`, `beta` (power law), `parameters` with intervals (a value of None is not
        determined, and `lacking` says which runs would determine it), `irreducible_error`, the
        fitted `points` with their weights, `noise` and `degrees_of_freedom` of the fit, the law's
        `curve` at the best division of compute, `residuals` in the order of the table, `optimal`
        (best divisions of compute, for laws in N and D), `paper` (coefficients of the procedure
        laion), `validation` (predictions of dearer runs from cheaper ones, None: too few runs),
        `hold_out`, `predictions` by run, `without_outliers`, `sensitivity`, `warnings`. With
        `compare`: `families` by name, each with the keys of a law, and `pairs` of families.
        """
        values: dict[str, Any] = {
            "metric": self.metric,
            "form": self.form,
            "link": self.link,
            "chance": self.chance,
            "procedure": self.procedure,
            "compute_unit": self.compute_unit,
            "warnings": list(self.warnings),
        }
        if self.compare:
            values["compare"] = self.compare
            values["families"] = {name: law.to_json() for name, law in self.laws.items()}
            values["pairs"] = [pair.to_json() for pair in self.pairs]
        else:
            values |= self.law.to_json()
            values["validation"] = self.validation.to_json() if self.validation else None
            if self.hold_out:
                values["hold_out"] = self.hold_out.to_json()
            values["predictions"] = {name: run.to_json() for name, run in self.predictions.items()}
        if self.without_outliers:
            values["without_outliers"] = self.without_outliers.to_json()
        if self.sensitivity:
            values["sensitivity"] = [variant.to_json() for variant in self.sensitivity]
        if self.plots:
            values["plots"] = list(self.plots)
        if self.files:
            values["files"] = list(self.files)
        if self.also is not None:
            values["also"] = [result.to_json() for result in self.also]
        return values


# ------------------------------------------------------------------ for a terminal


def describe(result: FitResult) -> str:
    """Format the result of `fit` as text."""
    title = f"{result.metric}: {describe_law(result.form, result.link)}"
    if result.chance:
        title += f" with chance at {result.chance:.4g}"
    unit = f"; C in {result.compute_unit}"
    lines = []
    if result.compare:
        lines.append(title + unit)
    for name, law in result.laws.items():
        count = f"{len(law.points)} points of {law.runs} runs"
        lines.append(f"{name} through {count}" if name else f"{title} through {count}{unit}")
        lines += _lines_of_law(law)
    if result.validation:
        lines += _lines_of_validation(result.validation)
    for pair in result.pairs:
        lines += compare.describe(pair)
    if result.hold_out:
        lines += _lines_of_hold_out(result.hold_out)
    for name, run in result.predictions.items():
        lines.append(f"{name}: {_in_words(run.answer)}")
    if result.without_outliers:
        lines += _lines_without_outliers(result.without_outliers)
    if result.sensitivity:
        lines.append("the same answer by other ways to fit:")
    for variant in result.sensitivity:
        words = _in_words(variant.answer) + ("; MISFITS" if variant.warnings else "")
        if variant.reason:
            words = "impossible: " + variant.reason.partition(". ")[0]
        lines.append(f"  {variant.name:25} {words}")
    lines += [f"written: {path}" for path in (*result.plots, *result.files)]
    lines += [f"warning: {line}" for line in result.warnings]
    lines += [describe(other) for other in result.also or ()]
    return "\n".join(lines)


def _lines_of_law(law: LawResult) -> list[str]:
    lines = []
    for name, parameter in law.parameters.items():
        interval = _interval(parameter.interval, ".4g")
        if parameter.value is not None:
            words = f"{parameter.value:<10.4g} {interval}"
        elif parameter.lacking and parameter.lacking.startswith("runs"):
            words = f"not determined; it takes {parameter.lacking}"
        else:
            words = f"not determined {interval}; it takes {parameter.lacking}"
        lines.append(f"  {name:13} {words}")
    if best := law.best_batch:
        value = f"{best.value:.3g} {_interval(best.interval, '.3g')}"
        lines.append(f"  best batch size for {short(best.samples)} pairs: {value}")
    if exponent := law.size_exponent:
        value = f"{exponent.value:.2f} {_interval(exponent.interval, '.2f')}"
        lines.append(f"  best division of compute: N grows as C^{value}")
    if law.paper:
        law_of_paper = "{a:.4g} (C + e^{b:.4g})^{c:.4g} + {d:.4g}".format(**law.paper)
        lines.append(f"  as in the paper, for C in GFLOPs x pairs seen: {law_of_paper}")
    return lines


def _lines_of_validation(validation: ValidationSummary) -> list[str]:
    averaged = [describe_law(law.form, law.link) for law in validation.laws if law.averaged]
    lines = []
    if len(averaged) > 1:
        lines.append(f"  predictions are the mean of {len(averaged)} laws: {', '.join(averaged)}")
    lines.append(f"validation: the runs below each of {validation.cuts} cuts predict those above")
    for group in validation.groups:
        name = f"{group.low:g} to {group.high:g} times beyond"
        if group.low == 1:
            name = f"up to {group.high:g} times beyond"
        if group.high == math.inf:
            name = f"more than {group.low:g} times beyond"
        words = f"{_difference(group.off, validation.is_score)} off (median of {group.predictions})"
        if group.checked:
            width = _difference(group.width, validation.is_score)
            words += f", {group.inside:.0%} of {group.checked} inside an interval {width} wide"
        lines.append(f"  {name}: {words}")
    return lines


def _difference(value: float, is_score: bool) -> str:
    return f"{100 * value:.1f} points" if is_score else f"{value:.2g}"


def _lines_without_outliers(without: WithoutOutliers) -> list[str]:
    points = "the point" if without.points == 1 else f"the {without.points} points"
    lines = [f"without {points} too far from the law to be noise:"]
    lines += _lines_of_law(without.law)
    lines += [f"  {name}: {_in_words(run.answer)}" for name, run in without.predictions.items()]
    return lines


def _lines_of_hold_out(held: HoldOut) -> list[str]:
    lines = [
        f"held-out runs: {len(held.runs)}, predicted from {held.fitted} others, off by "
        f"{held.mean_relative_error:.1%} on average, {held.inside_interval} inside the interval"
        f", {held.validated} with a validated one"
    ]
    for run in held.runs[:10]:
        measured = f"{1 - run.measured:.1%}" if run.answer.is_score else f"{run.measured:.4g}"
        settings = [f"{column} {value}" for column, value in run.settings.items()]
        name = ", ".join([f"{run.model}@{short(run.samples)}", *settings])
        lines.append(f"  {name}: {_in_words(run.answer)}, measured {measured}")
    return lines


def _interval(interval: tuple[float, float], form: str, name: str = "95%") -> str:
    low, high = interval
    return f"({name}: {low:{form}} to {high:{form}})"


def _in_words(answer: Answer) -> str:
    if answer.metric is None:
        return f"not determined; it takes {answer.lacking}"
    form = ".1%" if answer.is_score else ".4g"
    name = "95%" if answer.validated else "not validated"
    return f"{answer.metric.value:{form}} {_interval(answer.metric.interval, form, name)}"
