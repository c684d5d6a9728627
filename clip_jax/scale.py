"""Scaling experiments: gather runs into one table, fit it, ask the fit.

The unit of compute is Cherti et al.'s: forward GMACs of one image-text pair × pairs seen. A budget
is given in training FLOPs, which are 6e9 times that: two a multiply-add, three passes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from clip_jax.models import zoo
from clip_jax.scaling import fit as fits
from clip_jax.scaling import plots, table
from clip_jax.scaling.laws import BINS, Law, PowerLaw

TRAINING_FLOPS = 6e9  # of one forward GMAC
EXTRAPOLATION = 10.0  # times the largest run's compute, from which a prediction carries a warning

# Cherti et al. 2023, figures 1 and 2: alpha and beta, laid over a plot of the same metric.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "imagenet1k_acc1": {"LAION": (-0.1114, 5.858), "OpenAI": (-0.1638, 23.18)},
    "imagenet_robustness_acc1": {"LAION": (-0.1255, 11.61), "OpenAI": (-0.2378, 211.7)},
    "mscoco_captions_img_r5": {"LAION": (-0.0794, 2.750), "OpenAI": (-0.0508, 1.589)},
    "flickr30k_img_r5": {"LAION": (-0.1892, 15.51), "OpenAI": (-0.1028, 2.208)},
}


# ------------------------------------------------------------------ collect


@dataclass(frozen=True, kw_only=True)
class CollectConfig:
    """Gather finished runs into one table."""

    paths: tuple[Path, ...] = (Path("runs"),)  # work directories, open_clip's logs, CSV files
    output: Path = Path("scaling.csv")  # the table
    samples: tuple[str, ...] = ()  # CHECKPOINT=12.8B, for names that don't say what they have seen


def collect(config: CollectConfig) -> dict[str, Any]:
    """Write the table. Returns its path, the number of rows and why runs were left out."""
    samples = {}
    for pair in config.samples:
        name, equals, number = pair.rpartition("=")
        if not equals:
            raise ValueError(f"samples={pair!r} must be CHECKPOINT=NUMBER, such as openai=12.8B.")
        samples[name] = table.parse_count(number)
    rows, skipped = table.gather(config.paths, samples)
    if not rows:
        raise ValueError(
            f"no finished run under {', '.join(map(str, config.paths))}"
            + "".join(f"\n  {line}" for line in skipped)
        )
    table.write(rows, config.output)
    return {"table": str(config.output), "rows": len(rows), "skipped": skipped}


# ------------------------------------------------------------------ fit


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Fit a scaling law to a table of runs."""

    table: Path = Path("scaling.csv")  # what `scale collect` wrote, or such a table
    metric: str = "imagenet1k_acc1"  # column with the result
    metric_is: Literal["score", "error"] = "score"  # score: error = 1 − metric; error: as it is
    where: tuple[str, ...] = ()  # keep rows with COLUMN=PATTERN, such as upstream_dataset=LAION*
    form: fits.Form = "power"  # power: β·C^α; saturating: E∞ + A(C+B)^−α; additive: in N and D
    through: fits.Through | None = None  # frontier of bins or all runs; default: frontier for power
    bins: int = BINS  # of the frontier, equally wide in log C
    draws: int = 1_000  # of the bootstrap
    seed: int = 0  # of the bootstrap
    hold_out: float | None = None  # fit runs below this compute (forward GMACs), predict the others
    hold_out_samples: str | None = None  # the same with pairs seen, such as 12.8B
    predict: tuple[str, ...] = ()  # MODEL@SAMPLES, such as ViT-L-14@12.8B
    budget: float | None = None  # training FLOPs: which model, how many samples?
    candidates: tuple[str, ...] = ()  # models that a budget chooses from; default: the table's
    plot: Path | None = None  # write this path with .svg and .png

    def __post_init__(self) -> None:
        for name, least in (("bins", 3), ("draws", 100)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if self.hold_out is not None and self.hold_out_samples is not None:
            raise ValueError("give hold_out or hold_out_samples, not both.")


def fit(config: FitConfig) -> dict[str, Any]:
    """Fit and answer; everything as JSON values (`describe` puts it in words).

    Keys: `alpha`, `beta` (power law), `parameters` with intervals, `irreducible_error` (None where
    the runs do not determine it), `points` that the law went through, `hold_out`, `predictions`
    by what was asked, `budget`, `warnings`.
    """
    rows = table.read(config.table, config.metric, config.where)
    named = table.named(rows, config.metric, config.metric_is == "score")
    runs = named.runs
    through = config.through or ("frontier" if config.form == "power" else "all")
    options = {"bins": config.bins, "draws": config.draws, "seed": config.seed}
    found = fits.fit(config.form, runs, through, **options)

    result: dict[str, Any] = {
        "metric": config.metric,
        "form": config.form,
        "through": through,
        "compute_unit": "forward GMACs of a pair x pairs seen",
        "runs": len(runs.error),
        "points": [
            {"compute": float(compute), "error": float(error)}
            for compute, error in zip(found.fitted.compute, found.fitted.error, strict=True)
        ],
        "parameters": _parameters(found),
        "irreducible_error": fits.irreducible(found),
        "warnings": [],
    }
    if isinstance(found.law, PowerLaw):
        result |= {name: result["parameters"][name]["value"] for name in ("alpha", "beta")}
    held = None
    if config.hold_out is not None:
        held = runs.compute >= config.hold_out
    elif config.hold_out_samples is not None:
        # Runs see whole batches: as many samples as were asked for, up to rounding.
        held = runs.samples >= 0.99 * table.parse_count(config.hold_out_samples)
    if held is not None:
        tested = fits.hold_out(config.form, runs, held, through, **options)
        result["hold_out"] = _held(tested, int((~held).sum()))

    sizes = _sizes(rows)
    asked = {wanted: _asked(wanted, sizes) for wanted in config.predict}
    predicted = {
        wanted: (size * samples, found.predict(size, samples))
        for wanted, (size, samples) in asked.items()
    }
    result["predictions"] = {
        wanted: {"compute": compute, **_both(prediction, config.metric_is)}
        for wanted, (compute, prediction) in predicted.items()
    }
    result["warnings"] += [
        f"{wanted} is {compute / runs.compute.max():.0f} times the largest run's compute; the "
        "interval supposes that the law still holds there."
        for wanted, (compute, _) in predicted.items()
        if compute > EXTRAPOLATION * runs.compute.max()
    ]
    if config.budget is not None:
        additive = cast(
            fits.BootstrapFit,  # only a power law is a line
            found if config.form == "additive" else fits.fit("additive", runs, "all", **options),
        )
        names = config.candidates or tuple(dict.fromkeys(named.model))
        result["budget"] = _spend(config.budget, config.metric_is, additive, names, sizes)
    if config.plot is not None:
        reach = max([1.6 * runs.compute.max(), *(1.6 * c for c, _ in predicted.values())])
        page = plots.figure(
            named, found, fit_label=_formula(found), others=published(config.metric),
            predictions=predicted, reach=reach, error_label=_error_label(config),
            training_flops=TRAINING_FLOPS,
        )  # fmt: skip
        result["plots"] = [str(path) for path in plots.save(page, config.plot)]
    return result


def published(metric: str) -> dict[str, Law]:
    """Cherti et al.'s laws for a metric, by the models that they fit; none for other metrics."""
    return {
        f"{models} (Cherti et al.)": PowerLaw(alpha, beta)
        for models, (alpha, beta) in PUBLISHED.get(metric, {}).items()
    }


def _sizes(rows: list[dict[str, str]]) -> dict[str, float]:
    return {row["arch"]: float(row["gmacs_per_sample"]) for row in rows}


def _size(model: str, sizes: Mapping[str, float]) -> float:
    """Forward GMACs of a model: the table's, or the zoo's."""
    return sizes[model] if model in sizes else table.gmacs(zoo.get(model))


def _asked(wanted: str, sizes: Mapping[str, float]) -> tuple[float, float]:
    model, at, samples = wanted.rpartition("@")
    if not at:
        raise ValueError(f"predict={wanted!r} must be MODEL@SAMPLES, such as ViT-L-14@12.8B.")
    return _size(model, sizes), table.parse_count(samples)


def _parameters(found: fits.Fit) -> dict[str, Any]:
    return {
        name: {"value": float(value), "interval": list(found.interval(name))}
        for name, value in found.law._asdict().items()
    }


def _both(prediction: fits.Prediction, metric_is: str) -> dict[str, Any]:
    """An error with its interval and, where the metric is a score, the score with its own."""
    most = 1.0 if metric_is == "score" else math.inf  # nothing is wrong more often than always
    error, low, high = (min(float(value), most) for value in prediction)
    both: dict[str, Any] = {"error": error, "error_interval": [low, high]}
    if metric_is == "score":
        both |= {"score": 1 - error, "score_interval": [1 - high, 1 - low]}
    return both


def _held(held: fits.HoldOut, fitted: int) -> dict[str, Any]:
    rows = zip(held.runs.compute, held.runs.error, *np.stack(held.predicted), strict=True)
    return {
        "fitted": fitted,
        "mean_relative_error": float(np.abs(held.relative_error).mean()),
        "inside_interval": int(held.within.sum()),
        "runs": [
            {
                "compute": float(compute),
                "error": float(error),
                "predicted": float(predicted),
                "interval": [float(low), float(high)],
            }
            for compute, error, predicted, low, high in rows
        ],
    }


def _spend(
    budget: float,
    metric_is: str,
    additive: fits.BootstrapFit,
    names: tuple[str, ...],
    sizes: Mapping[str, float],
) -> dict[str, Any]:
    """Say which model serves a budget best, by the law that is additive in size and samples."""
    of_names = np.array([_size(name, sizes) for name in names])
    choice = fits.allocate(additive, budget / TRAINING_FLOPS, of_names)
    predicted, options = np.stack(choice.predicted), []
    for i, name in enumerate(names):
        prediction = fits.Prediction(*predicted[:, i])
        samples = budget / TRAINING_FLOPS / of_names[i]
        options.append(
            {
                "model": name,
                "samples": float(samples),
                **_both(prediction, metric_is),
                "share_of_draws": float(choice.share[i]),
            }
        )
    return {
        "training_flops": budget,
        "model": names[choice.best],
        "samples": choice.samples,
        "options": options,
    }


def _formula(found: fits.Fit) -> str:
    if isinstance(found.law, PowerLaw):
        return f"E = {found.law.beta:.4g}·C$^{{{found.law.alpha:.4f}}}$, 95% band"
    return "fit, 95% band"


def _error_label(config: FitConfig) -> str:
    return f"1 − {config.metric}" if config.metric_is == "score" else config.metric


def describe(result: Mapping[str, Any]) -> str:
    """Put the result of `fit` in words, for a terminal."""
    bins = result["through"] == "frontier"
    through = "the least errors of the bins of" if bins else "all of"
    lines = [
        f"{result['metric']}: {result['form']} law through {len(result['points'])} points, "
        f"{through} {result['runs']} runs; C in {result['compute_unit']}"
    ]
    for name, parameter in result["parameters"].items():
        value, (low, high) = parameter["value"], parameter["interval"]
        if name == "irreducible" and result["irreducible_error"] is None:
            lines.append(f"  {name:13} not determined by these runs (95%: {low:.4g} to {high:.4g})")
        else:
            lines.append(f"  {name:13} {value:<10.4g} (95%: {low:.4g} to {high:.4g})")
    if "hold_out" in result:
        held = result["hold_out"]
        lines.append(
            f"held out: {len(held['runs'])} runs predicted from the {held['fitted']} others, off "
            f"by {held['mean_relative_error']:.1%} on average, {held['inside_interval']} of them "
            "inside the 95% interval"
        )
    for wanted, prediction in result["predictions"].items():
        lines.append(f"{wanted}: {_words(prediction)}")
    if "budget" in result:
        budget = result["budget"]
        lines.append(
            f"{budget['training_flops']:.3g} training FLOPs: {budget['model']} on "
            f"{table.short(budget['samples'])} pairs"
        )
        lines += [
            f"  {option['model']:16} {table.short(option['samples']):>6} pairs  {_words(option)}, "
            f"best in {option['share_of_draws']:.0%} of draws"
            for option in budget["options"]
        ]
    lines += [f"written: {path}" for path in result.get("plots", [])]
    return "\n".join(lines + [f"warning: {line}" for line in result["warnings"]])


def _words(prediction: Mapping[str, Any]) -> str:
    if "score" in prediction:
        low, high = prediction["score_interval"]
        return f"{prediction['score']:.1%} (95%: {low:.1%} to {high:.1%})"
    low, high = prediction["error_interval"]
    return f"{prediction['error']:.4g} (95%: {low:.4g} to {high:.4g})"
