"""The result of `fit`: laws, predictions and comparisons, as JSON values and as text."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clip_jax.scaling import compare
from clip_jax.scaling.compare import FamilyPair
from clip_jax.scaling.run_table import short


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
    weight: float  # of its squared residual of log error, 1 on average


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
    inside_interval: int  # number of runs inside of their 95% intervals
    runs: Sequence[HeldOutRun]

    def to_json(self) -> dict[str, Any]:
        return {
            "fitted": self.fitted,
            "mean_relative_error": self.mean_relative_error,
            "inside_interval": self.inside_interval,
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
class FitResult:
    """Laws that were fitted to a table, and predictions by them."""

    metric: str
    form: str
    procedure: str
    compute_unit: str
    laws: Mapping[str, LawResult]  # by family; with `compare=None`, one by the name ""
    warnings: Sequence[str]
    compare: str | None = None  # column that divides the runs into families
    pairs: Sequence[FamilyPair] = ()  # of families
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
        laion), `hold_out`, `predictions` by run, `sensitivity`, `warnings`. With `compare`:
        `families` by name, each with the keys of a law, and `pairs` of families.
        """
        values: dict[str, Any] = {
            "metric": self.metric,
            "form": self.form,
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
            if self.hold_out:
                values["hold_out"] = self.hold_out.to_json()
            values["predictions"] = {name: run.to_json() for name, run in self.predictions.items()}
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
    title = f"{result.metric}: {result.form} law"
    unit = f"; C in {result.compute_unit}"
    lines = []
    if result.compare:
        lines.append(title + unit)
    for name, law in result.laws.items():
        count = f"{len(law.points)} points of {law.runs} runs"
        lines.append(f"{name} through {count}" if name else f"{title} through {count}{unit}")
        lines += _lines_of_law(law)
    for pair in result.pairs:
        lines += compare.describe(pair)
    if result.hold_out:
        lines += _lines_of_hold_out(result.hold_out)
    for name, run in result.predictions.items():
        lines.append(f"{name}: {_in_words(run.answer)}")
    if result.sensitivity:
        lines.append("the same answer by other ways to fit:")
    for variant in result.sensitivity:
        mark = "; MISFITS or leaves out points" if variant.warnings else ""
        lines.append(f"  {variant.name:25} {_in_words(variant.answer)}{mark}")
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


def _lines_of_hold_out(held: HoldOut) -> list[str]:
    lines = [
        f"held-out runs: {len(held.runs)}, predicted from {held.fitted} others, off by "
        f"{held.mean_relative_error:.1%} on average, {held.inside_interval} inside the "
        "95% interval"
    ]
    for run in held.runs[:10]:
        measured = f"{1 - run.measured:.1%}" if run.answer.is_score else f"{run.measured:.4g}"
        settings = [f"{column} {value}" for column, value in run.settings.items()]
        name = ", ".join([f"{run.model}@{short(run.samples)}", *settings])
        lines.append(f"  {name}: {_in_words(run.answer)}, measured {measured}")
    return lines


def _interval(interval: tuple[float, float], form: str) -> str:
    low, high = interval
    return f"(95%: {low:{form}} to {high:{form}})"


def _in_words(answer: Answer) -> str:
    if answer.metric is None:
        return f"not determined; it takes {answer.lacking}"
    form = ".1%" if answer.is_score else ".4g"
    return f"{answer.metric.value:{form}} {_interval(answer.metric.interval, form)}"
