"""Fit scaling laws to a table of runs, and predict from them.

The unit of compute is Cherti et al.'s: forward GMACs of one image-text pair × pairs seen. Budgets
are in training FLOPs, 6e9 times that.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np

from clip_jax.errors import InputError, check_ranges
from clip_jax.models import zoo
from clip_jax.scaling import plots, run_table
from clip_jax.scaling.laws import BINS, TRAINING_FLOPS, Additive, Law, PowerLaw, Runs, pareto
from clip_jax.scaling.run_table import Row, RunTable, gmacs, parse_count, short, text
from clip_jax.scaling.uncertainty import (
    Fit,
    Form,
    Prediction,
    Through,
    crossing,
    fit_law,
    middle,
    paired,
    ratios,
    sizes_of,
)
from clip_jax.storage.files import AnyPath, check_destination

THIRD = {"repeated": "unique_samples", "batched": "global_batch"}  # third columns that forms need
EXTRAPOLATION = 10.0  # multiple of the largest compute above which predictions get a warning

# Cherti et al. 2023, figures 1 and 2: alpha and beta, drawn in plots of the same metric.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "imagenet1k_acc1": {"LAION": (-0.1114, 5.858), "OpenAI": (-0.1638, 23.18)},
    "imagenet_robustness_acc1": {"LAION": (-0.1255, 11.61), "OpenAI": (-0.2378, 211.7)},
    "mscoco_captions_img_r5": {"LAION": (-0.0794, 2.750), "OpenAI": (-0.0508, 1.589)},
    "flickr30k_img_r5": {"LAION": (-0.1892, 15.51), "OpenAI": (-0.1028, 2.208)},
}


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Fit a scaling law to a table of runs."""

    metric: str = "imagenet1k_acc1"  # Column with the result of each run.
    # What the metric is. score: the law describes the error 1 − metric. error: the metric itself.
    metric_is: Literal["score", "error"] = "score"
    # Conditions COLUMN=PATTERN that a row must match, such as upstream_dataset=LAION*.
    where: tuple[str, ...] = ()
    # Form of the law, for compute C, model size N and samples D. power: β·C^α. saturating:
    # E∞ + A(C+B)^−α. additive: E∞ + A·N^−a + B·D^−b. repeated: additive, for several epochs over
    # the samples in column unique_samples. batched: additive, for batch sizes in global_batch.
    form: Form = "power"
    # Column that divides runs into families, such as family, schedule or data. Fits a law to each
    # family and compares them. None: one law for all runs.
    compare: str | None = None
    # Points to fit. frontier: the best run of each bin of compute. all: every run. None: frontier
    # for the form power, all for the others.
    through: Through | None = None
    bins: int = BINS  # Number of bins of the frontier, equally wide in log C.
    draws: int = 1_000  # Number of bootstrap draws for the 95% intervals.
    # Compute, as forward GMACs × pairs seen, from which on runs are predicted. None: fit all.
    hold_out: float | None = None
    # Pairs seen, such as 12.8B, from which on runs are predicted. None: fit all.
    hold_out_samples: str | None = None
    # Runs to predict, as MODEL@SAMPLES, such as ViT-L-14@12.8B; append /UNIQUE for the form
    # repeated, or /BATCH for batched.
    predict: tuple[str, ...] = ()
    # Training FLOPs for which to find the best model and number of samples. None: no search.
    budget: float | None = None
    candidates: tuple[str, ...] = ()  # Models to choose from for the budget. Empty: the table's.
    plot: AnyPath | None = None  # Path without suffix of the .svg and .png plot. None: no plot.

    def __post_init__(self) -> None:
        check_ranges(
            self, bins="[3, 10000]", draws="[100, 1000000]", hold_out="(0, inf)", budget="(0, inf)"
        )  # fmt: skip
        if self.hold_out is not None and self.hold_out_samples is not None:
            raise InputError("hold_out and hold_out_samples are both set; remove one.")
        questions = self.hold_out, self.hold_out_samples, self.budget, self.plot
        if self.compare and (self.predict or any(x is not None for x in questions)):
            raise InputError(
                "compare fits several laws; remove it, or hold_out, predict, budget and plot."
            )

    def runs(self, table: RunTable) -> Runs:
        return table.runs(self.metric, self.metric_is == "score", THIRD.get(self.form, ""))

    def fit(self, runs: Runs, family: int = 0) -> Fit:
        """Fit runs; each family has its own bootstrap seed, so that they are independent."""
        through, bins, draws = self.passes_through, self.bins, self.draws
        return fit_law(self.form, runs, through, bins=bins, draws=draws, seed=family)

    @property
    def passes_through(self) -> Through:
        return self.through or ("frontier" if self.form == "power" else "all")


@dataclass(frozen=True, kw_only=True)
class FitCommand(FitConfig):
    """Fit a scaling law to a table of runs."""

    table: AnyPath = Path("scaling.csv")  # Table of runs (CSV), as written by `scale collect`.


def fit_file(command: FitCommand) -> dict[str, Any]:
    """Run `fit` on the table in a file."""
    for path in plots.both(command.plot) if command.plot else ():
        check_destination(path, "--plot", folder=False)
    return fit(run_table.read(command.table), command)


def fit(table: RunTable, config: FitConfig) -> dict[str, Any]:
    """Fit laws and predict with them; returns JSON values (`describe` formats them as text).

    Keys: `alpha`, `beta` (power law), `parameters` with intervals, `irreducible_error` (None if the
    runs do not determine it), the fitted `points`, the law's `curve` at the best division of
    compute, `residuals` in the order of the table, `optimal` (best divisions of compute, for laws
    in N and D), `hold_out`, `predictions` by run, `budget`, `warnings`. With `compare`: `families`
    by name, each with the keys of a law, and `pairs` of families.
    """
    table = table.select(config.metric, config.where)
    result: dict[str, Any] = {
        "metric": config.metric,
        "form": config.form,
        "through": config.passes_through,
        "compute_unit": "forward GMACs of a pair x pairs seen",
        "warnings": [],
    }
    if config.compare:
        return result | _compare(table, config.compare, config)
    runs = config.runs(table)
    fitted = config.fit(runs)
    result |= _law(fitted)
    if config.hold_out is not None:
        result["hold_out"] = _hold_out(runs, runs.compute >= config.hold_out, config)
    elif config.hold_out_samples is not None:
        # Runs see complete batches, so their samples match the option up to rounding.
        held = runs.samples >= 0.99 * parse_count(config.hold_out_samples)
        result["hold_out"] = _hold_out(runs, held, config)

    sizes = {row["arch"]: float(row["gmacs_per_sample"]) for row in table.rows}
    largest = runs.compute.max()
    predicted: dict[str, tuple[float, Prediction]] = {}
    result["predictions"] = {}
    for wanted in config.predict:
        size, samples, third = _run_of(wanted, sizes)
        compute, prediction = size * samples, fitted.predict(size, samples, third)
        predicted[wanted] = compute, prediction
        result["predictions"][wanted] = {"compute": compute, **_prediction(prediction, config)}
        if compute > EXTRAPOLATION * largest:
            result["warnings"].append(
                f"{wanted} has {compute / largest:.0f} times the compute of the largest run; the "
                "interval assumes that the law still holds there."
            )
    if config.budget is not None:
        names = config.candidates or tuple(sizes)
        result["budget"] = _budget(config.budget, names, sizes, fitted, config)
    if config.plot:
        is_score = config.metric_is == "score"
        page = plots.figure(
            fitted, others=published(config.metric), predictions=predicted,
            error_label=f"1 − {config.metric}" if is_score else config.metric,
            reach=1.6 * max([largest, *(compute for compute, _ in predicted.values())]),
        )  # fmt: skip
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
    law, runs, sizes = fitted.law, fitted.runs, sizes_of([fitted])
    span = np.geomspace(runs.compute.min() / 1.6, 1.6 * runs.compute.max(), 60)
    curve = np.stack([span, *fitted.best(span, sizes)["error"]])
    parameters = {
        name: {"value": float(value), "interval": list(fitted.interval(name))}
        for name, value in law.parameters.items()
    }
    result: dict[str, Any] = {
        "runs": len(runs.error),
        "points": [
            {"compute": compute, "error": error}
            for compute, error in np.stack([fitted.fitted.compute, fitted.fitted.error]).T.tolist()
        ],
        "parameters": parameters,
        "irreducible_error": fitted.irreducible,
        "curve": [
            {"compute": compute, "error": error, "interval": interval}
            for compute, error, *interval in curve.T.tolist()
        ],
        "residuals": (runs.error / runs.under(law) - 1).tolist(),
    }
    if isinstance(law, PowerLaw):
        result |= {name: parameter["value"] for name, parameter in parameters.items()}
    if isinstance(law, Additive) and isinstance(fitted.drawn, Additive):
        # From the smallest compute of the runs to ten times the largest.
        low, high = np.log10([runs.compute.min(), EXTRAPOLATION * runs.compute.max()])
        compute = 10.0 ** np.arange(np.ceil(low), high)
        tables = {name: np.stack(x).T.tolist() for name, x in fitted.best(compute, sizes).items()}
        result["optimal"] = {
            "size_exponent": {
                "value": float(law.size_exponent),
                "interval": list(map(float, middle(np.asarray(fitted.drawn.size_exponent)))),
            },
            "divisions": [
                {"compute": c, "training_flops": c * TRAINING_FLOPS}
                | {name: {"value": x[i][0], "interval": x[i][1:]} for name, x in tables.items()}
                for i, c in enumerate(compute.tolist())
            ],
        }
    return result


def _hold_out(runs: Runs, held: np.ndarray, config: FitConfig) -> dict[str, Any]:
    """Fit the runs that are not `held` and predict those that are: usually the largest.

    A fit through the frontier describes only the best runs, so it predicts only held-out runs that
    no other run beats with at most their compute. Raises InputError if there are none.
    """
    tested = held & pareto(runs) if config.passes_through == "frontier" else held
    if not tested.any():
        raise InputError(
            f"nothing to predict: of {len(held)} runs, {held.sum()} are held out, and none of "
            f"these can be tested; lower hold_out: compute reaches {runs.compute.max():g}."
        )
    test, fitted = runs.where(tested), config.fit(runs.where(~held))
    predicted = fitted.predict(test.size, test.samples, test.third)
    inside = (predicted.low <= test.error) & (test.error <= predicted.high)
    return {
        "fitted": int((~held).sum()),
        "mean_relative_error": float(np.abs(predicted.error / test.error - 1).mean()),
        "inside_interval": int(inside.sum()),
        "runs": [
            {"compute": compute, "error": error, "predicted": prediction, "interval": interval}
            for compute, error, prediction, *interval in np.stack(
                [test.compute, test.error, *predicted]
            ).T.tolist()
        ],
    }


def _run_of(wanted: str, sizes: Mapping[str, float]) -> tuple[float, float, float | None]:
    """Read MODEL@SAMPLES or MODEL@SAMPLES/THIRD."""
    model, at, samples = wanted.rpartition("@")
    if not at:
        raise InputError(f"predict={wanted!r} must be MODEL@SAMPLES, such as ViT-L-14@12.8B.")
    samples, slash, third = samples.partition("/")
    count = parse_count(samples)
    return _size(model, sizes), count, parse_count(third) if slash else None


def _size(model: str, sizes: Mapping[str, float]) -> float:
    """Return the forward GMACs of a model, from the table or the zoo."""
    return sizes[model] if model in sizes else gmacs(zoo.get(model))


def _prediction(prediction: Prediction, config: FitConfig) -> dict[str, Any]:
    """Return an error with its interval and, if the metric is a score, the score with its own."""
    is_score = config.metric_is == "score"
    most = 1.0 if is_score else math.inf  # an error of 1 − score is at most 1
    error, low, high = (min(float(value), most) for value in prediction)
    both: dict[str, Any] = {"error": error, "error_interval": [low, high]}
    return both | ({"score": 1 - error, "score_interval": [1 - high, 1 - low]} if is_score else {})


def _budget(
    budget: float, names: Sequence[str], sizes: Mapping[str, float], fitted: Fit, config: FitConfig
) -> dict[str, Any]:
    """Choose the best model for a budget, by a law that is additive in size and samples."""
    if not isinstance(fitted.law, Additive):
        fitted = fit_law("additive", fitted.runs, "all", draws=config.draws)
    size = np.array([_size(name, sizes) for name in names])
    samples = budget / TRAINING_FLOPS / size
    predicted = fitted.predict(size, samples)
    best = int(np.argmin(predicted.error))
    choices = fitted.draws(size, samples).argmin(axis=1)
    return {
        "training_flops": budget,
        "model": names[best],
        "samples": float(samples[best]),
        "options": [
            {
                "model": name,
                "samples": float(samples[i]),
                **_prediction(Prediction(*np.stack(predicted)[:, i]), config),
                "share_of_draws": float((choices == i).mean()),
            }
            for i, name in enumerate(names)
        ],
    }


# ------------------------------------------------------------------ comparison of families


def family_of(row: Row, column: str) -> str:
    """Return the name of a row's family: its text in a column."""
    return text(row, column) or f"no {column}"


def _compare(table: RunTable, column: str, config: FitConfig) -> dict[str, Any]:
    """Fit every family of runs separately, and compare every pair."""
    table.check(column)
    families: dict[str, Fit] = {}
    alike, warnings = {}, []
    groups = sorted(table.groups(lambda row: family_of(row, column)).items())
    for number, (name, members) in enumerate(groups):
        runs = config.runs(members)
        try:
            families[name] = config.fit(runs, number)
        except InputError as error:
            warnings.append(f"{name} is left out: {error}")
        else:
            alike[name] = _by_the_rest(members, runs)
    if len(families) < 2:
        raise InputError(
            f"compare={column!r} needs two or more families that can be fitted, not "
            + "; ".join([*families, *warnings]) + "."
        )  # fmt: skip
    return {
        "compare": column,
        "families": {name: _law(fitted) for name, fitted in families.items()},
        "pairs": [_pair(pair, families, alike) for pair in combinations(families, 2)],
        "warnings": warnings,
    }


def _by_the_rest(table: RunTable, runs: Runs) -> dict[tuple[str, ...], float]:
    """Map (size, samples, seed) to the error, without runs that share these."""
    lengths = np.asarray(runs.length).tolist()
    keys = [(row["arch"], x, text(row, "seed")) for row, x in zip(table.rows, lengths, strict=True)]
    errors = zip(keys, runs.error.tolist(), strict=True)
    return {key: error for key, error in errors if keys.count(key) == 1}


def _pair(
    names: tuple[str, str], families: Mapping[str, Fit], alike: Mapping[str, Mapping[Any, float]]
) -> dict[str, Any]:
    """Compare two families: the crossing and the ratios of their laws, and matching runs.

    `alike` has the errors of each family by (size, samples, seed).
    """
    first, second = (families[name] for name in names)
    one, other = (alike[name] for name in names)
    least = max(fitted.runs.compute.min() for fitted in (first, second))  # in both families
    most = min(fitted.runs.compute.max() for fitted in (first, second))
    cross = crossing(first, second)
    pairs = np.array([(one[key], other[key]) for key in one if key in other]).reshape(-1, 2)
    measured = paired(pairs)
    high = cross.high if math.isfinite(cross.high) else None  # JSON has no infinity
    return {
        "families": list(names),
        "crossing": {**cross._asdict(), "high": high},
        "ratios": [x._asdict() for x in ratios(first, second, np.array([least, most]))],
        "paired": measured and measured._asdict(),
    }


# ------------------------------------------------------------------ for a terminal


def describe(result: Mapping[str, Any]) -> str:
    """Format the result of `fit` as text."""
    law = f"{result['metric']}: {result['form']} law"
    unit = f"; C in {result['compute_unit']}"
    lines = [law + unit] if "families" in result else []
    through = "the least errors of the bins of" if result["through"] == "frontier" else "all of"
    for name, family in result.get("families", {"": result}).items():
        count = f"{len(family['points'])} points, {through} {family['runs']} runs"
        lines += [f"{name or law} through {count}{'' if name else unit}", *_lines_of_law(family)]
    for pair in result.get("pairs", ()):
        lines += _lines_of_pair(pair)
    if "hold_out" in result:
        held = result["hold_out"]
        lines.append(
            f"held out: {len(held['runs'])} runs predicted from the {held['fitted']} others, off "
            f"by {held['mean_relative_error']:.1%} on average, {held['inside_interval']} of them "
            "inside the 95% interval"
        )
    for wanted, prediction in result.get("predictions", {}).items():
        lines.append(f"{wanted}: {_in_words(prediction)}")
    if "budget" in result:
        budget = result["budget"]
        lines.append(
            f"{budget['training_flops']:.3g} training FLOPs: {budget['model']} on "
            f"{short(budget['samples'])} pairs"
        )
        lines += [
            f"  {option['model']:16} {short(option['samples']):>6} pairs  {_in_words(option)}, "
            f"best in {option['share_of_draws']:.0%} of draws"
            for option in budget["options"]
        ]
    lines += [f"written: {path}" for path in result.get("plots", [])]
    return "\n".join(lines + [f"warning: {line}" for line in result["warnings"]])


def _lines_of_law(family: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, parameter in family["parameters"].items():
        value = f"{parameter['value']:<10.4g}"
        if name == "irreducible" and family["irreducible_error"] is None:
            value = "not determined by these runs"
        lines.append(f"  {name:13} {value} {_interval(parameter['interval'], '.4g')}")
    if "optimal" in family:
        exponent = family["optimal"]["size_exponent"]
        lines.append(
            f"  best division of compute: N grows as C^{exponent['value']:.2f} "
            + _interval(exponent["interval"], ".2f")
        )
        for at in family["optimal"]["divisions"]:
            size, samples, error = (at[name]["value"] for name in ("size", "samples", "error"))
            lines.append(
                f"    {at['training_flops']:.1e} training FLOPs: {size:.3g} GMACs a pair, "
                f"{short(samples)} pairs, error {error:.4g}"
            )
    return lines


def _interval(interval: Sequence[float], form: str) -> str:
    low, high = interval
    return f"(95%: {low:{form}} to {high:{form}})"


def _in_words(prediction: Mapping[str, Any]) -> str:
    name, form = ("score", ".1%") if "score" in prediction else ("error", ".4g")
    return f"{prediction[name]:{form}} {_interval(prediction[f'{name}_interval'], form)}"


def _lines_of_pair(pair: Mapping[str, Any]) -> list[str]:
    one, other = pair["families"]
    lines = [f"{other} compared with {one}:"]
    for at, which in zip(pair["ratios"], ("smallest", "largest"), strict=True):
        lines.append(
            f"  at the {which} shared compute, {at['compute']:.3g}: {_ratio(at, '+.1%')}, lower "
            f"in {at['share']:.0%} of draws"
        )
    cross = pair["crossing"]
    high = math.inf if cross["high"] is None else cross["high"]
    interval = _interval((cross["low"], high), ".3g")
    name, start = pair["families"][cross["better"]], cross["compute"] or 0
    better = f"{name} is better from {start:.3g} on {interval}"
    if not cross["low"] and cross["high"] is None:
        better = "these runs do not determine which is better at what compute"
    lines.append(f"  {better}; the laws cross in {cross['share']:.0%} of draws")
    if alike := pair["paired"]:
        lines.append(f"  in {alike['pairs']} pairs of matching runs: {_ratio(alike, '+.2%')}")
    return lines


def _ratio(at: Mapping[str, float], form: str) -> str:
    return f"{at['ratio'] - 1:{form}} error {_interval((at['low'] - 1, at['high'] - 1), form)}"
