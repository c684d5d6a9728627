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

from clip_jax.errors import InputError, check_ranges
from clip_jax.models import zoo
from clip_jax.scaling import compare, plots, table
from clip_jax.scaling import fit as fits
from clip_jax.scaling.laws import BINS, OF_SIZE, Law, PowerLaw, Runs
from clip_jax.storage import files
from clip_jax.storage.files import Place

TRAINING_FLOPS = 6e9  # of one forward GMAC
THIRD = {"repeated": "unique_samples", "batched": "global_batch"}  # columns that forms take besides
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

    paths: tuple[Place, ...] = (Path("runs"),)  # work directories, open_clip's logs, CSV files
    output: Place = Path("scaling.csv")  # the table
    samples: tuple[str, ...] = ()  # CHECKPOINT=12.8B, for names that don't say what they have seen


def collect(config: CollectConfig) -> dict[str, Any]:
    """Write the table. Returns its path, the number of rows and why runs were left out."""
    files.check_destination(config.output, "--output", folder=False)
    samples = {}
    for pair in config.samples:
        name, equals, number = pair.rpartition("=")
        if not equals:
            raise InputError(f"samples={pair!r} must be CHECKPOINT=NUMBER, such as openai=12.8B.")
        samples[name] = table.parse_count(number)
    rows, skipped = table.gather(config.paths, samples)
    if not rows:
        raise InputError(
            f"no finished run under {', '.join(map(str, config.paths))}"
            + "".join(f"\n  {line}" for line in skipped)
        )
    table.write(rows, config.output)
    return {"table": str(config.output), "rows": len(rows), "skipped": skipped}


# ------------------------------------------------------------------ fit


@dataclass(frozen=True, kw_only=True)
class FitConfig:
    """Fit a scaling law to a table of runs."""

    table: Place = Path("scaling.csv")  # what `scale collect` wrote, or such a table
    metric: str = "imagenet1k_acc1"  # column with the result
    metric_is: Literal["score", "error"] = "score"  # score: error = 1 − metric; error: as it is
    where: tuple[str, ...] = ()  # keep rows with COLUMN=PATTERN, such as upstream_dataset=LAION*
    # power: β·C^α; saturating: E∞ + A(C+B)^−α; additive: E∞ + A·N^−a + B·D^−b; repeated: that with
    # epochs over fewer samples (column unique_samples); batched: with a batch (global_batch)
    form: fits.Form = "power"
    # Column by which to fit families apart and compare them, such as family, schedule or data
    compare: str | None = None
    through: fits.Through | None = None  # frontier of bins or all runs; default: frontier for power
    bins: int = BINS  # of the frontier, equally wide in log C
    draws: int = 1_000  # of the bootstrap
    seed: int = 0  # of the bootstrap
    hold_out: float | None = None  # fit runs below this compute (forward GMACs), predict the others
    hold_out_samples: str | None = None  # the same with pairs seen, such as 12.8B
    # MODEL@SAMPLES, such as ViT-L-14@12.8B; with /UNIQUE (repeated) or /BATCH (batched) behind
    predict: tuple[str, ...] = ()
    budget: float | None = None  # training FLOPs: which model, how many samples?
    candidates: tuple[str, ...] = ()  # models that a budget chooses from; default: the table's
    plot: Place | None = None  # write this path with .svg and .png

    def __post_init__(self) -> None:
        check_ranges(
            self, bins="[3, 10000]", draws="[100, 1000000]", seed="[0, inf)",
            hold_out="(0, inf)", budget="(0, inf)",
        )  # fmt: skip
        if self.hold_out is not None and self.hold_out_samples is not None:
            raise InputError("give hold_out or hold_out_samples, not both.")
        asked = self.hold_out, self.hold_out_samples, self.budget
        if self.compare and (self.predict or any(x is not None for x in asked)):
            raise InputError("compare fits several laws; hold_out, predict and budget ask one.")


def fit(config: FitConfig) -> dict[str, Any]:
    """Fit and answer; everything as JSON values (`describe` puts it in words).

    Keys: `alpha`, `beta` (power law), `parameters` with intervals, `irreducible_error` (None where
    the runs do not determine it), `points` that the law went through, its `curve` where compute is
    divided best, `residuals` of the runs in the table's order, `optimal`: how compute is divided
    best, by a law in N and D; `hold_out`, `predictions` by what was asked, `budget`, `warnings`.
    With `compare`: `families` by name, each with those of the above that a law has, and
    `pairs` of them.
    """
    for path in plots.both(config.plot) if config.plot else ():
        files.check_destination(path, "--plot", folder=False)
    rows = table.read(config.table, config.metric, config.where)
    through = config.through or ("frontier" if config.form == "power" else "all")
    result: dict[str, Any] = {
        "metric": config.metric,
        "form": config.form,
        "through": through,
        "compute_unit": "forward GMACs of a pair x pairs seen",
        "warnings": [],
    }
    if config.compare:
        return result | _compared(config, rows, through)
    named = _named(config, rows)
    runs = named.runs
    options = {"bins": config.bins, "draws": config.draws, "seed": config.seed}
    fitting = fits.fit(config.form, runs, through, **options)
    result |= _fitted(runs, fitting)
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
        wanted: (size * samples, fitting.predict(size, samples, third))
        for wanted, (size, samples, third) in asked.items()
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
        of_size = isinstance(fitting.law, OF_SIZE)
        additive = cast(
            fits.BootstrapFit,  # only a power law is a line
            fitting if of_size else fits.fit("additive", runs, "all", **options),
        )
        names = config.candidates or tuple(dict.fromkeys(named.model))
        result["budget"] = _spend(config.budget, config.metric_is, additive, names, sizes)
    if config.plot is not None:
        reach = max([1.6 * runs.compute.max(), *(1.6 * c for c, _ in predicted.values())])
        page = plots.figure(
            named, fitting, fit_label=_formula(fitting), others=published(config.metric),
            predictions=predicted, reach=reach, error_label=_error_label(config),
            training_flops=TRAINING_FLOPS,
        )  # fmt: skip
        result["plots"] = [str(path) for path in plots.save(page, config.plot)]
    return result


def _named(config: FitConfig, rows: list[dict[str, str]]) -> plots.Named:
    third = THIRD.get(config.form, "")
    return table.named(rows, config.metric, config.metric_is == "score", third)


def _fitted(runs: Runs, fitting: fits.Fit) -> dict[str, Any]:
    """What there is to say of any law through some runs."""
    sizes = compare.sizes_of([compare.Family(runs, fitting)])
    span = np.geomspace(runs.compute.min() / 1.6, 1.6 * runs.compute.max(), 60)
    curve = np.stack([span, *fits.best(fitting, span, sizes)["error"]])
    result: dict[str, Any] = {
        "runs": len(runs.error),
        "points": [
            {"compute": float(compute), "error": float(error)}
            for compute, error in zip(fitting.fitted.compute, fitting.fitted.error, strict=True)
        ],
        "parameters": _parameters(fitting),
        "irreducible_error": fits.irreducible(fitting),
        "curve": [
            {"compute": compute, "error": error, "interval": interval}
            for compute, error, *interval in curve.T.tolist()
        ],
        "residuals": (runs.error / runs.under(fitting.law) - 1).tolist(),
    }
    if isinstance(fitting.law, PowerLaw):
        result |= {name: result["parameters"][name]["value"] for name in ("alpha", "beta")}
    if isinstance(fitting.law, OF_SIZE):
        result["optimal"] = _optimal(runs, fitting, sizes)
    return result


def _optimal(runs: Runs, fitting: fits.Fit, sizes: tuple[float, float]) -> dict[str, Any]:
    """How compute is divided best, from the least of the runs to ten times the largest."""
    low, high = np.log10([runs.compute.min(), EXTRAPOLATION * runs.compute.max()])
    compute = 10.0 ** np.arange(np.ceil(low), high)
    divided = fits.best(fitting, compute, sizes)
    tables = {name: np.stack(x).T.tolist() for name, x in divided.items()}
    return {
        "size_exponent": {
            "value": float(_share(fitting.law)),
            "interval": list(map(float, fits.middle(np.asarray(_share(fitting.drawn))))),
        },
        "divisions": [
            {"compute": c, "training_flops": c * TRAINING_FLOPS}
            | {name: {"value": x[i][0], "interval": x[i][1:]} for name, x in tables.items()}
            for i, c in enumerate(compute.tolist())
        ],
    }


def _share(law: Any) -> Any:
    """With which power of compute the best size grows."""
    return law.samples_alpha / (law.size_alpha + law.samples_alpha)


def _compared(
    config: FitConfig, rows: list[dict[str, str]], through: fits.Through
) -> dict[str, Any]:
    """Fit every family of runs on its own, and compare every two."""
    column = str(config.compare)
    if column not in rows[0]:
        raise InputError(f"compare={column!r} is no column; there are {', '.join(rows[0])}.")
    by_value: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_value.setdefault(row[column] or "", []).append(row)
    families, alike, warnings = {}, {}, []
    for number, (value, mine) in enumerate(sorted(by_value.items())):
        name = value or f"no {column}"
        labelled = _named(config, mine)
        try:  # from a seed of its own: families are independent of each other
            fitting = fits.fit(
                config.form, labelled.runs, through,
                bins=config.bins, draws=config.draws, seed=config.seed + number,
            )  # fmt: skip
        except InputError as error:
            warnings.append(f"{name} is left out: {error}")
            continue
        families[name] = compare.Family(labelled.runs, fitting)
        alike[name] = _by_the_rest(mine, labelled)
    if len(families) < 2:
        raise InputError(
            f"compare={column!r} takes two families of runs or more; there is "
            + "; ".join([*families, *warnings]) + "."
        )  # fmt: skip
    result: dict[str, Any] = {
        "compare": column,
        "families": {name: _fitted(x.runs, x.fit) for name, x in families.items()},
        "pairs": compare.side_by_side(families, alike),
        "warnings": warnings,
    }
    if config.plot is not None:
        page = plots.compared(families, error_label=_error_label(config))
        result["plots"] = [str(path) for path in plots.save(page, config.plot)]
    return result


def _by_the_rest(rows: list[dict[str, str]], named: plots.Named) -> dict[tuple[str, ...], float]:
    """Name errors by size, samples and seed; runs that these do not tell apart are left out."""
    keys = [
        (model, samples, row.get("seed") or "")
        for model, samples, row in zip(named.model, named.samples, rows, strict=True)
    ]
    errors = zip(keys, named.runs.error.tolist(), strict=True)
    return {key: error for key, error in errors if keys.count(key) == 1}


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


def _asked(wanted: str, sizes: Mapping[str, float]) -> tuple[float, float, float | None]:
    model, at, samples = wanted.rpartition("@")
    if not at:
        raise InputError(f"predict={wanted!r} must be MODEL@SAMPLES, such as ViT-L-14@12.8B.")
    samples, slash, third = samples.partition("/")
    return (
        _size(model, sizes),
        table.parse_count(samples),
        table.parse_count(third) if slash else None,
    )


def _parameters(fitting: fits.Fit) -> dict[str, Any]:
    return {
        name: {"value": float(value), "interval": list(fitting.interval(name))}
        for name, value in fitting.law._asdict().items()
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


def _formula(fitting: fits.Fit) -> str:
    if isinstance(fitting.law, PowerLaw):
        return f"E = {fitting.law.beta:.4g}·C$^{{{fitting.law.alpha:.4f}}}$, 95% band"
    return "fit, 95% band"


def _error_label(config: FitConfig) -> str:
    return f"1 − {config.metric}" if config.metric_is == "score" else config.metric
