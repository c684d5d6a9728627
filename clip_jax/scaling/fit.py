"""Fit scaling laws to a table of runs, and predict from them.

The unit of compute is Cherti et al.'s: forward GMACs of one image-text pair × pairs seen. Budgets
are in training FLOPs, 6e9 times that.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clip_jax.errors import InputError, check_ranges
from clip_jax.scaling import compare, laion, papers, plots, run_table
from clip_jax.scaling.compare import FamilyPair
from clip_jax.scaling.fit_result import (
    Answer,
    BestBatch,
    CurvePoint,
    Estimate,
    FitResult,
    FittedPoint,
    HeldOutRun,
    HoldOut,
    LawResult,
    Parameter,
    PredictedRun,
    Variant,
    WithoutOutliers,
    summary,
)
from clip_jax.scaling.forecast import (
    OF_COMPUTE,
    OF_SIZES,
    Laws,
    default_form,
    fit_laws,
    fitted_guesses,
)
from clip_jax.scaling.laws import BINS, Additive, Batched, Law, PowerLaw, Runs, Saturating, pareto
from clip_jax.scaling.links import ERROR, Link, LinkName, link_of, starts_at_chance
from clip_jax.scaling.run_table import MOST_FLOPS, RunTable, Selection, is_score, text
from clip_jax.scaling.uncertainty import Fit, Form, Prediction, Procedure, fit_law, middle, sizes_of
from clip_jax.scaling.validation import Candidate, validate
from clip_jax.storage.files import AnyPath, check_destination

THIRD = {"repeated": "unique_samples", "batched": "global_batch"}  # third columns that forms need
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
    # E∞ + A(C+B)^−α. broken: a power law whose exponent changes once. additive: E∞ + A·N^−a +
    # B·D^−b. interaction: additive + G·N^−a·D^−b. repeated: additive, for several epochs over the
    # samples in column unique_samples. batched: additive, with a best batch size, for batch sizes
    # in global_batch; if these are five or more, their exponents are fitted, too. None: the form
    # that predicts dearer runs from cheaper ones best.
    form: Form | None = None
    # Scale of the error that the law describes. error: 1 − score, or the loss. odds: error / score.
    # log_score: −log(score). A saturating law of the odds is a sigmoid in log compute. None: the
    # scale that predicts dearer runs from cheaper ones best. If the runs are too few to say, it is
    # odds for runs that start near chance, and else error. The two others need a score or `chance`.
    link: LinkName | None = None
    # Value of the metric for random guesses, for the scales odds and log_score. Of a score, such as
    # 0.01 for 100 classes: both are those of (score − chance) / (1 − chance). Of a loss, such as
    # 6.93, the logarithm of 1,024 pairs: those of 1 − loss / chance. fitted: the value with which
    # the law comes closest to the runs. None: 0 for a score, and no such scale for a loss.
    chance: float | Literal["fitted"] | None = None
    # Number of classes of the metric, as a shorter way to set `chance` to 1 / classes.
    classes: int | None = None
    # Quantity that C is, for the forms power and saturating. hours is the column seconds/total. The
    # others are columns: training_flops includes a teacher's, student_flops does not.
    against: Literal["compute", "samples", "hours", "training_flops", "student_flops"] = "compute"
    # Column that divides runs into families, such as family, schedule or data. Fits a law to each
    # family and compares them. None: one law for all runs.
    compare: str | None = None
    # Points to fit. all: every run. frontier: the runs that no other beats with at most their
    # compute. cherti: the lowest error of each of 5 bins of compute, at its centre, as in
    # arXiv:2212.07143. laion: the best run of each bin of compute, by least squares of the error
    # itself, in the form saturating (arXiv:2506.04598).
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
        check_ranges(
            self,
            bins="[3, 10000]",
            draws="[100, 1000000]",
            evaluated="[2, inf)",
            classes="[2, inf)",
        )
        self._check_chance()
        if self.compare and (self.predict or self.sensitivity or self.hold_out or self.plot):
            raise InputError(
                "compare fits several laws; remove it, or hold_out, predict, sensitivity and plot."
            )
        if self.procedure == "laion" and self.against != "compute":
            raise InputError(f"procedure=laion needs --against compute, not {self.against}.")

    def _check_chance(self) -> None:
        known = self.chance is not None or self.classes is not None
        if self.chance is not None and self.classes is not None:
            raise InputError(f"chance={self.chance} and classes={self.classes}: set one of them.")
        if known and self.link == "error":
            raise InputError("link=error has no chance level; remove link, or chance and classes.")
        if self.classes is not None and not self.is_score:
            raise InputError(
                f"classes={self.classes} needs a score, but {self.metric} is an error; set chance "
                "to the error of random guesses instead."
            )
        if self.link not in (None, "error") and not self.is_score and not known:
            raise InputError(
                f"link={self.link} needs a score, but {self.metric} is an error; set chance to the "
                "error of random guesses, remove link, or set metric_is=score."
            )
        if self.chance not in (None, "fitted"):
            check_ranges(self, chance="[0, 1)" if self.is_score else "(0, inf)")

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
        runs = runs._replace(setting=np.array(setting), others=_others(table, third))
        if self.run:
            table.check(self.run)
            runs = runs._replace(run=np.array([text(row, self.run) for row in table.rows]))
        if self.evaluated:
            # Of a score of 0 or 1 as if half of an image counted the other way.
            score = np.clip(1 - runs.error, 0.5 / self.evaluated, 1 - 0.5 / self.evaluated)
            runs = runs._replace(binomial=score * (1 - score) / self.evaluated)
        return runs

    def candidates(self, tables: Sequence[Runs], forms: tuple[Form, ...] = ()) -> list[Candidate]:
        """Return the laws that may describe all tables of runs, the default one first.

        `forms` are those to choose from; empty: the form of the config, or all that the runs allow.
        """
        default: Form = "saturating" if self.procedure == "laion" else "power"
        if self.form or forms:
            default = self.form or forms[0]
            forms = (default,) if self.form else forms
        elif self.procedure == "all" and self.against == "compute":
            default = default_form(tables)
        if self.procedure != "all":
            forms = (default,)
        elif not forms:
            forms = OF_SIZES if default == "additive" else OF_COMPUTE
        links: tuple[LinkName, ...] = ("error",)
        error = np.concatenate([runs.error for runs in tables])
        guesses = self._guesses(tables, default)
        if self.link:
            links = (self.link,)
        elif self.procedure == "all" and guesses:
            near = starts_at_chance(error, guesses)
            links = ("odds", "error", "log_score") if near else ("error", "odds", "log_score")
        ordered = sorted(forms, key=lambda form: form != default)
        return [
            Candidate(form, link_of(name, error, guesses or 1.0))
            for form in ordered
            for name in links
        ]

    def _guesses(self, tables: Sequence[Runs], form: Form) -> float | None:
        """Return the error of random guesses; None: there are no scales that need it."""
        if self.link == "error" or self.procedure != "all":
            return None
        if self.chance == "fitted":
            if any((runs.error <= 0).any() for runs in tables):
                return 1.0  # which `fit_law` refuses
            name = self.link or "odds"
            return float(np.mean([fitted_guesses(form, name, x, self.is_score) for x in tables]))
        if self.is_score:
            return 1 - (self.chance or (1 / self.classes if self.classes else 0.0))
        if self.chance is None:
            return None
        lowest = min(float(runs.error.min()) for runs in tables)
        if lowest >= self.chance:
            raise InputError(
                f"chance={self.chance:g} is not above any value of {self.metric}, of which the "
                f"lowest is {lowest:.4g}; set it to the error of random guesses."
            )
        return self.chance

    def chance_of(self, link: Link) -> float | None:
        """Return the value of the metric for random guesses; None: the scale has none."""
        if link.name == "error":
            return None
        return 1 - link.guesses if self.is_score else link.guesses

    def fit(self, runs: Runs, family: int = 0, candidates: Sequence[Candidate] = ()) -> Laws:
        """Fit runs; each family has its own bootstrap seed, so that they are independent."""
        candidates = candidates or self.candidates([runs])
        if self.procedure == "all":
            return fit_laws(candidates, runs, self.is_score, draws=self.draws, seed=family)
        return Laws([self.fit_one(candidates[0], runs, family)], candidates[:1], self.is_score)

    def fit_one(self, candidate: Candidate, runs: Runs, family: int = 0) -> Fit:
        """Fit one law to runs, without validation."""
        return fit_law(
            candidate.form,
            runs,
            self.procedure,
            bins=self.bins,
            draws=self.draws,
            seed=family,
            link=candidate.link,
        )


@dataclass(frozen=True, kw_only=True)
class FitCommand(FitConfig):
    """Fit a scaling law to a table of runs."""

    table: AnyPath = Path("scaling.csv")  # Table of runs (CSV), as written by `scale collect`.
    also: tuple[str, ...] = ()  # More metrics to fit in the same way, each with its own law.
    # Path without ending of files for papers: runs, points and curve as CSV, the law as a LaTeX
    # table. None: none.
    output: AnyPath | None = None


def _others(table: RunTable, third: str) -> np.ndarray | None:
    """Return further settings of runs, `[n, k]`: numbers, and e for the members of a kind."""
    others = []
    for name in OTHERS:
        is_complete = all(text(row, name) for row in table.rows)
        if name != third and is_complete and table.numbers(name).min() != 0:
            others.append(table.bounded(name))
    for kind in KINDS:
        names = np.array([text(row, kind) for row in table.rows])
        others += [np.where(names == name, math.e, 1.0) for name in np.unique(names)[1:]]
    return np.stack(others, axis=-1) if others else None


def fit_file(command: FitCommand) -> FitResult:
    """Run `fit` on the table in a file, and write what the command asks for."""
    for flag, stem in (("plot", command.plot), ("output", command.output)):
        if stem is not None and not stem.name:
            raise InputError(f"{flag}={str(stem)!r} has no name; set a path such as paper.")
    for stem in (command.plot, plots.of_validation(command.plot)) if command.plot else ():
        for path in plots.both(stem):
            check_destination(path, "--plot", folder=False)
    for path in papers.paths(command.output) if command.output else ():
        check_destination(path, "--output", folder=False)
    table = run_table.read(command.table, command.columns)
    result = fit(table, command)
    if command.output:
        rows = table.select(command.metric, command.where)
        column = command.compare
        tables = rows.groups(lambda row: family_of(row, column)) if column else {"": rows}
        result = replace(result, files=papers.write(result, tables, command.output))
    also = [
        fit(table, replace(command, metric=metric, metric_is=None, plot=None))
        for metric in command.also
    ]
    return replace(result, also=also)


def fit(table: RunTable, config: FitConfig) -> FitResult:
    """Fit laws to the selected runs of a table, and predict with them."""
    table = table.select(config.metric, config.where)
    if config.compare:
        return _fit_families(table, config, config.compare)
    runs = config.runs(table)
    laws = config.fit(runs)
    fitted = laws.fit
    warnings = fitted.misfit()
    largest = runs.compute.max()
    predictions = _predictions(laws, table, config)
    for name, run in predictions.items():
        if run.compute > EXTRAPOLATION * largest:
            warnings.append(
                f"{name} has {run.compute / largest:.0f} times the compute of the largest run; the "
                "interval assumes that the law errs there as it did within the table."
            )
    without = None
    if others := laws.without_outliers():
        without = WithoutOutliers(
            points=len(fitted.seeds) - len(others.fit.seeds),
            law=_law(others.fit, config),
            predictions=_predictions(others, table, config),
        )
    hold_out = _hold_out(table, config) if config.hold_out else None
    if hold_out:
        warnings += [f"without the held-out runs: {line}" for line in hold_out.warnings]
    return FitResult(
        metric=config.metric,
        form=laws.candidates[0].form,
        link=laws.candidates[0].link.name,
        chance=config.chance_of(laws.candidates[0].link),
        procedure=config.procedure,
        compute_unit=AXES[config.against][1],
        laws={"": _law(fitted, config)},
        validation=summary(laws.validation) if laws.validation else None,
        warnings=warnings,
        without_outliers=without,
        hold_out=hold_out,
        predictions=predictions,
        sensitivity=_sensitivity(laws, table, runs, config) if config.sensitivity else (),
        plots=_plot(laws, predictions, config, config.plot) if config.plot else (),
    )


def _predictions(laws: Laws, table: RunTable, config: FitConfig) -> dict[str, PredictedRun]:
    """Predict the runs that a config names."""
    predictions: dict[str, PredictedRun] = {}
    for name in config.predict:
        size, samples, third = _run_of(name, table, config)
        answer = _answer(laws, size, samples, third, config)
        predictions[name] = PredictedRun(size * samples, answer)
    return predictions


def _plot(
    laws: Laws, predictions: Mapping[str, PredictedRun], config: FitConfig, stem: AnyPath
) -> list[str]:
    """Draw a fit and predicted runs; return the paths of the plot."""
    fitted = laws.fit
    determined: dict[str, tuple[float, Prediction]] = {}
    for name, run in predictions.items():
        if run.answer.error:
            prediction = Prediction(run.answer.error.value, *run.answer.error.interval)
            determined[name] = run.compute, prediction
    farthest = max([fitted.runs.compute.max(), *(compute for compute, _ in determined.values())])
    page = plots.figure(
        fitted,
        others=published(config.metric),
        predictions=determined,
        error_label=f"1 − {config.metric}" if config.is_score else config.metric,
        reach=1.6 * farthest,
        title="The law misfits these runs: see the warnings." if fitted.misfit() else "",
    )
    paths = plots.save(page, stem)
    if laws.validation:
        picture = plots.validation(laws.validation, config.metric)
        paths += plots.save(picture, plots.of_validation(stem))
    return [str(path) for path in paths]


def published(metric: str) -> dict[str, Law]:
    """Return Cherti et al.'s laws for a metric, by their models; empty for other metrics."""
    return {
        f"{models} (Cherti et al.)": PowerLaw(alpha, beta)
        for models, (alpha, beta) in PUBLISHED.get(metric, {}).items()
    }


def _law(fitted: Fit, config: FitConfig) -> LawResult:
    """Return what one fit states about its law."""
    law = fitted.law
    runs = fitted.runs
    points = fitted.fitted
    span = np.geomspace(runs.compute.min() / 1.6, 1.6 * runs.compute.max(), 60)
    divides = isinstance(law, Additive) and min(points.values("size"), points.values("samples")) > 2
    largest = float(runs.size.max())
    sizes = sizes_of([fitted]) if divides or not isinstance(law, Additive) else (largest, largest)
    best = law.optimum(span, sizes)
    has_best_batch = isinstance(law, Batched) and not (
        fitted.lacking("negatives") or fitted.lacking("steps")
    )
    third = None
    if isinstance(law, Batched) and not has_best_batch and runs.third is not None:
        third = np.full_like(span, np.median(runs.third))
    curve = np.stack([span, *fitted.curve(best.size, best.samples, third)])
    parameters = {name: _parameter(fitted, name) for name in law.parameters}
    is_laion = isinstance(law, Saturating) and config.procedure == "laion"
    best_batch = None
    if has_best_batch:
        samples = float(np.median(runs.samples))
        drawn: Any = fitted.drawn
        low, high = middle(drawn.best_batch(samples))
        best_batch = BestBatch(samples, float(law.best_batch(samples)), (float(low), float(high)))
    exponent = None
    if divides:
        interval = fitted.region.inner(lambda law: law.size_exponent)
        exponent = Estimate(float(law.size_exponent), interval)
    return LawResult(
        runs=len(runs.error),
        points=_points(fitted),
        parameters=parameters,
        curve=[
            CurvePoint(compute, error, (low, high))
            for compute, error, low, high in curve.T.tolist()
        ],
        residuals=(runs.error / fitted.errors(runs) - 1).tolist(),
        noise=fitted.noise,
        degrees_of_freedom=float(fitted.freedom),
        alpha=float(law.alpha) if isinstance(law, PowerLaw) else None,
        beta=float(law.beta) if isinstance(law, PowerLaw) else None,
        best_batch=best_batch,
        size_exponent=exponent,
        paper=laion.coefficients(law) if is_laion else None,
    )


def _points(fitted: Fit) -> list[FittedPoint]:
    """Return the points of a fit, with all that a reader needs to fit them again."""
    points = fitted.fitted
    thirds = [None] * len(points.error) if points.third is None else points.third.tolist()
    columns = (
        points.compute.tolist(),
        np.asarray(fitted.link.error(points.error)).tolist(),
        points.size.tolist(),
        points.samples.tolist(),
        thirds,
        fitted.seeds.tolist(),
        fitted.weights.tolist(),
    )
    return [FittedPoint(*values) for values in zip(*columns, strict=True)]


def _parameter(fitted: Fit, name: str) -> Parameter:
    lacking = fitted.lacking(name)
    value = None if lacking else float(fitted.law.parameters[name])
    interval = fitted.interval(name)
    return Parameter(value, (interval.low, interval.high), lacking or None)


def _hold_out(table: RunTable, config: FitConfig) -> HoldOut:
    """Fit the runs that are not held out and predict those that are.

    A fit through the frontier describes only the best runs, so it predicts only held-out runs that
    no other run beats with at most their compute. Raises InputError if there are none.
    """
    runs = config.runs(table)
    held = np.array(table.meets(config.hold_out))
    laws = config.fit(runs.where(~held)) if held.any() and not held.all() else None
    tested = held & pareto(runs) if config.procedure != "all" else held
    test = runs.where(tested)
    settings = _differing(list(itertools.compress(table.rows, tested)))
    answers = [] if laws is None else _answers(laws, test.size, test.samples, test.third, config)
    columns = np.asarray(test.model), test.error, test.samples, settings, answers
    predicted: list[HeldOutRun] = []
    estimates: list[tuple[float, float, float, float]] = []  # measured, predicted and its interval
    for model, measured, samples, varied, answer in zip(*columns, strict=laws is not None):
        if answer.error is None:
            continue
        predicted.append(
            HeldOutRun(
                model=str(model),
                samples=float(samples),
                measured=float(measured),
                answer=answer,
                settings=varied,
            )
        )
        estimates.append((measured, answer.error.value, *answer.error.interval))
    if not predicted or laws is None:
        raise InputError(
            f"nothing to predict: of {len(held)} runs, {held.sum()} are held out, and none of "
            f"these can be tested; change hold_out={list(config.hold_out)}."
        )
    measured, error, low, high = np.array(estimates).T
    return HoldOut(
        fitted=int((~held).sum()),
        mean_relative_error=float(np.abs(error / measured - 1).mean()),
        inside_interval=int(((low <= measured) & (measured <= high)).sum()),
        validated=sum(run.answer.validated for run in predicted),
        warnings=laws.fit.misfit(),
        runs=predicted,
    )


def _differing(rows: Sequence[run_table.Row]) -> list[dict[str, str]]:
    """Return for each row the settings in which the rows differ, but for model and samples."""
    columns = [name for name in (*SETTINGS[3:], "seed") if len({text(x, name) for x in rows}) > 1]
    return [{name: text(row, name) for name in columns} for row in rows]


def _run_of(name: str, table: RunTable, config: FitConfig) -> tuple[float, float, float | None]:
    """Read MODEL@SAMPLES or MODEL@SAMPLES/THIRD."""
    model, at, samples = name.rpartition("@")
    if not at:
        raise InputError(f"predict={name!r} must be MODEL@SAMPLES, such as ViT-L-14@12.8B.")
    if config.against not in ("compute", "samples"):
        raise InputError(f"predict needs a law of compute or samples, not of {config.against}.")
    samples, slash, third = samples.partition("/")
    size = table.size_of(model)
    size = 1.0 if config.against == "samples" else size
    return size, run_table.parse_count(samples), run_table.parse_count(third) if slash else None


def _answer(
    laws: Laws, size: float, samples: float, third: float | None, config: FitConfig
) -> Answer:
    """Predict the error of a run; no error if the runs do not determine it."""
    thirds = None if third is None else np.array([third])
    return _answers(laws, np.array([size]), np.array([samples]), thirds, config)[0]


def _answers(
    laws: Laws, size: np.ndarray, samples: np.ndarray, third: np.ndarray | None, config: FitConfig
) -> list[Answer]:
    """Predict the errors of runs; see `_answer`."""
    if third is None and isinstance(laws.fit.law, Batched):
        if lacking := laws.fit.lacking("negatives") or laws.fit.lacking("steps"):
            needed = f"{lacking} for the best batch size, or a run to predict with its /BATCH"
            return [Answer(error=None, lacking=needed, is_score=config.is_score)] * len(size)
        third = np.asarray(laws.fit.law.batch_to_use(samples))
    answers = []
    for i, forecast in enumerate(laws.predict_all(size, samples, third)):
        run = float(size[i]), float(samples[i]), None if third is None else float(third[i])
        if lacking := laws.unknown(*run):
            answers.append(Answer(error=None, lacking=lacking, is_score=config.is_score))
            continue
        error, low, high = map(float, forecast.prediction)
        estimate = Estimate(error, (low, high))
        answers.append(
            Answer(error=estimate, validated=forecast.validated, is_score=config.is_score)
        )
    return answers


def _sensitivity(laws: Laws, table: RunTable, runs: Runs, config: FitConfig) -> list[Variant]:
    """Return the answer of each variant of a fit, with its warnings."""
    variants = []
    best = laws.candidates[0]
    for name, variant, selected in _variants(runs, config, best.form):
        try:
            if name == "as asked":
                varied = laws
            else:
                rows = list(itertools.compress(table.rows, selected))
                link = best.link if variant.procedure == "all" else ERROR
                candidate = Candidate(variant.form or best.form, link)
                fit_one = variant.fit_one(candidate, variant.runs(RunTable(rows)))
                varied = Laws([fit_one], [candidate], config.is_score)
            if config.predict:
                run = _run_of(config.predict[0], table, variant)
            else:
                compute = EXTRAPOLATION * runs.compute.max()
                division = varied.fit.law.optimum(compute, sizes_of([varied.fit]))
                run = float(division.size), float(division.samples), None
            answer = _answer(varied, *run, variant)
            variants.append(Variant(name=name, answer=answer, warnings=varied.fit.misfit()))
        except InputError as error:
            answer = Answer(error=None, lacking="other runs")
            variants.append(Variant(name=name, answer=answer, reason=str(error)))
    return variants


def _variants(
    runs: Runs, config: FitConfig, best: Form
) -> Iterator[tuple[str, FitConfig, np.ndarray]]:
    """Yield a name, a config and which runs it takes, for each variant of a fit."""
    every = np.ones(len(runs.error), bool)
    yield "as asked", config, every
    forms: tuple[Form, ...] = ("power", "saturating", "additive")
    for form in forms:
        if form != best and not (form == "additive" and config.against != "compute"):
            yield f"form {form}", replace(config, form=form, procedure="all"), every
    line = replace(config, form="power")
    yield "frontier", replace(line, procedure="frontier"), every
    for bins in (3, 5, 10, 30):
        yield f"cherti, {bins} bins", replace(line, procedure="cherti", bins=bins), every
    if config.against == "compute":
        yield "laion", replace(config, form="saturating", procedure="laion"), every
    for share in (0.1, 0.25):
        least = np.quantile(runs.compute, share)
        yield f"without the smallest {share:.0%}", config, runs.compute >= least
    for model in dict.fromkeys(np.asarray(runs.model).tolist()):
        yield f"without {model}", config, np.asarray(runs.model) != model


# ------------------------------------------------------------------ comparison of families


def family_of(row: run_table.Row, column: str) -> str:
    """Return the name of a row's family: its text in a column."""
    return text(row, column) or f"no {column}"


def _common(tables: Iterable[Runs], config: FitConfig) -> Candidate:
    """Return the law that predicts dearer runs of most families best; of several, the simplest."""
    tables = [*tables]
    candidates = config.candidates(tables)
    if len(candidates) == 1 or not all((runs.error > 0).all() for runs in tables):
        return candidates[0]
    validations = [validate(candidates, runs, config.is_score) for runs in tables]

    def worse(candidate: Candidate) -> tuple[int, int]:
        families = sum(candidate in validation.chosen for validation in validations if validation)
        return -families, len(candidate.kind.names())

    return min(candidates, key=worse)


def _fit_families(table: RunTable, config: FitConfig, column: str) -> FitResult:
    """Fit every family of runs separately, and compare every pair."""
    table.check(column)
    groups = dict(sorted(table.groups(lambda row: family_of(row, column)).items()))
    members = {name: config.runs(rows) for name, rows in groups.items()}
    candidate = _common(members.values(), config)
    families: dict[str, Fit] = {}
    warnings = []
    for seed, (name, runs) in enumerate(members.items()):
        try:
            families[name] = config.fit_one(candidate, runs, seed)
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
    for first, second in itertools.combinations(families, 2):
        errors = families[first].runs.error, families[second].runs.error
        pairs.append(
            FamilyPair(
                families=(first, second),
                comparison=compare.compare(families[first], families[second]),
                paired=compare.paired(groups[first], groups[second], errors),
            )
        )
    return FitResult(
        metric=config.metric,
        form=candidate.form,
        link=candidate.link.name,
        chance=config.chance_of(candidate.link),
        procedure=config.procedure,
        compute_unit=AXES[config.against][1],
        laws={name: _law(fitted, config) for name, fitted in families.items()},
        warnings=warnings,
        compare=column,
        pairs=pairs,
    )
