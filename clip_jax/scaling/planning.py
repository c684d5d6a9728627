"""Plan a run for a budget: a scaling law divides it between the model's size and pairs seen."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from clip_jax.errors import InputError, check_ranges, naming
from clip_jax.models import zoo
from clip_jax.pods import plan as pods
from clip_jax.pods.topology import Topology
from clip_jax.scaling import run_table
from clip_jax.scaling.choose import fit_rule, learning_rate
from clip_jax.scaling.columns import numeric
from clip_jax.scaling.fit import FitConfig
from clip_jax.scaling.forecast import Laws
from clip_jax.scaling.laws import TRAINING_FLOPS, Batched
from clip_jax.scaling.run_table import (
    MOST_FLOPS,
    RunTable,
    Selection,
    number,
    parse_count,
    short,
    text,
)
from clip_jax.scaling.uncertainty import Fit, Form, middle, sizes_of
from clip_jax.scaling.validation import describe as describe_law
from clip_jax.serialize import from_dict
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import read_json

BY_DEFAULT: tuple[Form, ...] = ("additive", "interaction")  # forms that divide a budget
MOST_PAIRS = 1_000_000_000  # of a batch
EPOCHS = 4  # up to which repeated pairs are worth almost as much as new ones (arXiv:2305.16264)


@dataclass(frozen=True, kw_only=True)
class ScalePlanConfig(Selection):
    """Plan a run for a budget, by a law that is fitted to a table of runs."""

    table: AnyPath = Path("scaling.csv")  # Table of runs (CSV), as written by `scale collect`.
    budget: str = "1e21"  # Training FLOPs, chip-hours (300chip-hours) or dollars (5000usd).
    topology: Annotated[Topology, pods.AsText] = pods.V5E  # Pod, such as v5e:16x16 or H100:64.
    chip_hour_price: float | None = None  # Price of one chip-hour, in dollars. None: no price.
    mfu: float = 0.4  # Assumed MFU (0 to 1) for hours and price.
    # Output of `clip-jax plan --json` for the same chip. Its MFU bound limits the MFU. None: none.
    bound: AnyPath | None = None
    metric: str = "imagenet1k_acc1"  # Column with the result of each run.
    metric_is: Literal["score", "error"] | None = None  # Kind of metric. None: by its name.
    # Form of the law. None: additive or interaction, by how well they predict dearer runs.
    form: Literal["additive", "interaction", "repeated", "batched"] | None = None
    candidates: tuple[str, ...] = ()  # Models to choose from. Empty: the table's.
    unique: str | None = None  # Number of distinct pairs, such as 400M. None: no pair is repeated.
    # Batch size. None: the best one by the form batched, or that of the nearest run.
    batch_size: int | None = None
    sweep: AnyPath | None = None  # Output of `scale choose --json`, for the learning rate.

    def __post_init__(self) -> None:
        check_ranges(
            self, chip_hour_price="(0, inf)", mfu="[1e-6, 1]", batch_size=f"[2, {MOST_PAIRS}]"
        )
        if self.form == "repeated" and self.unique is None:
            raise InputError("form=repeated needs the number of distinct pairs; set --unique.")
        self.training_flops()  # raises for a budget that cannot be read

    @property
    def flops_of_chip_hour(self) -> float:
        return 3600 * self.mfu * self.topology.chip.peak_flops

    def training_flops(self) -> float:
        """Return the training FLOPs that the budget pays for."""
        units = {"": 1.0, "chip-hours": self.flops_of_chip_hour}
        if self.chip_hour_price:
            units["usd"] = self.flops_of_chip_hour / self.chip_hour_price
        match = re.fullmatch(r"(\d+(?:\.\d+)?(?:e\+?\d+|[KMB])?)(|chip-hours|usd)", self.budget)
        is_valid = match is not None and match[2] in units
        flops = numeric(match[1]) * units[match[2]] if is_valid else 0.0
        if not 1 <= flops <= MOST_FLOPS:
            raise InputError(
                f"budget={self.budget!r} must be training FLOPs such as 1e21, 300chip-hours, or "
                f"5000usd with --chip-hour-price, the price of one {self.topology.chip.name} hour; "
                f"from 1 to {MOST_FLOPS:g} FLOPs."
            )
        return flops


@dataclass(frozen=True, kw_only=True)
class Optima:
    """The best learning rates of one point of a sweep, one for each seed."""

    width: float
    global_batch: float
    optima: tuple[float, ...]

    def __post_init__(self) -> None:
        check_ranges(self, width="(0, inf)", global_batch="(0, inf)", optima="(0, inf)")


def choices(
    laws: Laws, sizes: Mapping[str, float], budget: float, third: float | None = None
) -> list[dict[str, Any]]:
    """Return every model at the pairs that a budget of training FLOPs pays for, the best first.

    `sizes` are forward GMACs of a pair by model, `third` is the law's third quantity. `share` is
    that of the draws in which an option is the best; `outside` says how it lies outside the runs.
    """
    size = np.array([*sizes.values()])
    runs = laws.fit.runs
    samples = budget / TRAINING_FLOPS / size
    best = laws.fit.draws(size, samples, third).argmin(axis=1)
    thirds = None if third is None else np.full(len(size), third)
    forecasts = laws.predict_all(size, samples, thirds)
    columns = zip(sizes, size.tolist(), samples.tolist(), forecasts, strict=True)
    options = []
    for i, (name, gmacs, seen, forecast) in enumerate(columns):
        if lacking := laws.unknown(gmacs, seen, third):
            raise InputError(f"these runs predict no {name} of {short(seen)} pairs; add {lacking}.")
        ratios = {
            "compute": gmacs * seen / runs.compute,
            "size": gmacs / runs.size,
            "pairs": seen / runs.samples,
        }
        outside = []
        for what, ratio in ratios.items():
            factor = np.clip(1.0, ratio.min(), ratio.max())
            if abs(factor - 1) > 0.005:  # runs see complete batches
                edge = "largest" if factor > 1 else "smallest"
                outside.append(f"{what} {factor:.3g} × the {edge}")
        options.append(
            {
                "model": name,
                "size": gmacs,
                "samples": seen,
                "error": float(forecast.prediction.error),
                "interval": [float(forecast.prediction.low), float(forecast.prediction.high)],
                "validated": forecast.validated,
                "share": (best == i).mean().item(),
                "outside": outside,
            }
        )
    return sorted(options, key=lambda option: option["error"])


def plan(config: ScalePlanConfig) -> dict[str, Any]:
    """Return the best model with its settings, time and price, and all options, as JSON values.

    Raises InputError for a table, a sweep or a bound that gives no answer.
    """
    if config.bound:
        bound = _mfu_bound(config.bound, config.topology)
        config = replace(config, mfu=min(config.mfu, bound), bound=None)
    optima = _optima(config.sweep) if config.sweep else []
    unique = None if config.unique is None else parse_count(config.unique)
    law = FitConfig(metric=config.metric, metric_is=config.metric_is, form=config.form, draws=300)
    table = run_table.read(config.table, config.columns).select(config.metric, config.where)
    runs = law.runs(table)
    laws = law.fit(runs, candidates=law.candidates([runs], () if config.form else BY_DEFAULT))
    fitted = laws.fit
    _check_improves(fitted, config.metric)
    models = config.candidates or dict.fromkeys(row["arch"] for row in table.rows)
    sizes = {model: table.size_of(model) for model in models}
    thirds = {"repeated": unique, "batched": float(config.batch_size or 0)}
    third = thirds.get(config.form or "") or None
    options = choices(laws, sizes, config.training_flops(), third)
    best = options[0]
    batch_size = config.batch_size or _batch_size(config, table, fitted, best["samples"])
    if batch_size > best["samples"]:
        raise InputError(
            f"the budget pays for {short(best['samples'])} pairs of {best['model']}, less than one "
            f"batch of {batch_size:,}; raise --budget, or lower --batch-size."
        )
    rate = None
    if config.sweep:
        rate = _learning_rate(optima, config.sweep, table, best["model"], batch_size)
    compute = best["size"] * best["samples"]
    epochs = unique and best["samples"] / unique
    law_best, drawn_best = fitted.best(np.array([compute]), sizes_of([fitted]))
    best_size = [float(x) for x in np.ravel([law_best.size, *middle(np.asarray(drawn_best.size))])]
    chip_hours = compute * TRAINING_FLOPS / config.flops_of_chip_hour
    price = config.chip_hour_price
    warnings = fitted.misfit()
    if outside := [*best["outside"], *(rate["outside"] if rate else ())]:
        warnings.append(f"the plan extrapolates, as if its laws held there: {', '.join(outside)}.")
    if epochs and epochs > EPOCHS and config.form != "repeated":
        warnings.append(
            f"each pair is seen {epochs:.1f} times. Beyond {EPOCHS} epochs, repeated pairs are "
            "worth less than new ones (arXiv:2305.16264), which only the form repeated counts."
        )
    return best | {
        "metric": config.metric,
        "is_score": law.is_score,
        "form": laws.candidates[0].form,
        "link": laws.candidates[0].link.name,
        "averaged": [str(candidate) for candidate in laws.candidates],
        "runs": len(fitted.runs.error),
        "training_flops": compute * TRAINING_FLOPS,
        "best_size": best_size,
        "unique": unique,
        "epochs": epochs,
        "batch_size": batch_size,
        "steps": round(best["samples"] / batch_size),
        "learning_rate": rate,
        "topology": str(config.topology),
        "mfu": config.mfu,
        "hours": chip_hours / config.topology.chips,
        "chip_hours": chip_hours,
        "price": price and chip_hours * price,
        "options": options,
        "warnings": warnings,
    }


def _mfu_bound(path: AnyPath, topology: Topology) -> float:
    """Return the bound of the MFU that `clip-jax plan --json` printed for the chip of a pod."""
    if not path.is_file():
        raise InputError(f"there is no {path}; `clip-jax plan --json` prints one.")
    planned = read_json(path, "mfu_bound", advice="Run `clip-jax plan --json`.")
    bound = planned["mfu_bound"]
    if type(bound) not in (int, float) or not 0 < bound < float("inf"):
        raise InputError(
            f"{path}: mfu_bound is {bound!r}, but it must be a number above 0. A step that does "
            "not fit has none; plan one that fits with `clip-jax plan --json`."
        )
    with naming(path):
        planned_for = Topology.parse(str(planned.get("name", topology)))
    if planned_for.chip != topology.chip:
        raise InputError(
            f"{path} is the plan of {planned_for}, with the chip {planned_for.chip.name}, but "
            f"--topology {topology} has the chip {topology.chip.name}; plan the step for that one."
        )
    return bound


def _check_improves(fitted: Fit, metric: str) -> None:
    """Raise InputError unless more compute lowers the law's error, at its best division."""
    compute = fitted.runs.compute
    span = np.array([compute.min() / 10, compute.max() * 10])
    first, last = np.asarray(fitted.best(span, sizes_of([fitted]))[0].error)
    if last > first * (1 - 1e-6):
        raise InputError(
            f"by the law of these runs, more compute does not improve {metric}: its error is "
            f"{first:.4g} for the least compute and {last:.4g} for the most. Set --metric-is score "
            "or error if the metric is the other kind, or exclude runs with --where."
        )


def _batch_size(config: ScalePlanConfig, table: RunTable, fitted: Fit, samples: float) -> int:
    """Return the law's best batch size, or that of the run of the nearest length."""
    if isinstance(fitted.law, Batched):
        if lacking := fitted.lacking("negatives") or fitted.lacking("steps"):
            raise InputError(f"no best batch size: set --batch-size, or add {lacking}.")
        devices = config.topology.devices
        return max(round(float(fitted.law.batch_to_use(samples)) / devices), 1) * devices
    if "global_batch" not in table.columns:
        raise InputError("the table has no column global_batch; set --batch-size.")
    nearest = min(table.rows, key=lambda x: abs(np.log(number(x, "samples_seen") / samples)))
    batch_size = number(nearest, "global_batch")
    if not 2 <= batch_size <= MOST_PAIRS:
        raise InputError(
            f"global_batch of {nearest['arch']} is {batch_size:g}, but a batch must have from 2 to "
            f"{MOST_PAIRS:g} pairs; correct the table, or set --batch-size."
        )
    return int(batch_size)


def _optima(sweep: AnyPath) -> list[tuple[float, float, float]]:
    """Read widths, batch sizes and learning rates of the optima of a sweep."""
    if not sweep.is_file():
        raise InputError(f"there is no {sweep}; `clip-jax scale choose --json` prints one.")
    advice = "Run `clip-jax scale choose --json`."
    points = read_json(sweep, "points", advice=advice)["points"]
    try:
        fields = [_fields_of_optima(point) for point in from_dict(list[Any], points, "points")]
        read = from_dict(list[Optima], fields, "points")
    except InputError as error:
        raise InputError(f"{sweep} is damaged: {error} {advice}") from error
    return [(point.width, point.global_batch, rate) for point in read for rate in point.optima]


def _fields_of_optima(point: Any) -> Any:
    """Select the fields of Optima from those that `scale choose` prints of a point."""
    if not isinstance(point, dict):
        return point
    return {name: point[name] for name in Optima.__annotations__ if name in point}


def _learning_rate(
    optima: Sequence[tuple[float, float, float]],
    sweep: AnyPath,
    table: RunTable,
    model: str,
    batch: int,
) -> dict[str, Any]:
    """Predict the learning rate by the rule of the sweep's optima, those of all widths."""
    if (rule := fit_rule(optima)) is None:
        raise InputError(
            f"{sweep} has {len(optima)} optima; a rule needs three or more, of two or more widths. "
            "Extend the sweep of `scale choose --json`."
        )
    widths = {row["arch"]: text(row, "width") for row in table.rows}
    width = float(widths.get(model) or zoo.get(model).vision.width)
    value, *interval = learning_rate(rule, width, batch)
    widths_swept, batches_swept, _ = zip(*optima, strict=True)
    outside = []
    if not min(widths_swept) <= width <= max(widths_swept):
        outside.append(f"sweep: width {width:g}")
    if not min(batches_swept) <= batch <= max(batches_swept):
        outside.append(f"sweep: batch {batch:g}")
    return {"value": value, "interval": interval, "outside": outside}


def describe(plan: Mapping[str, Any]) -> str:
    """Format a plan as text."""

    def between(value: float, low: float, high: float, form: str = ".3g", name: str = "95%") -> str:
        return f"{value:{form}} ({name}: {low:{form}} to {high:{form}})"

    lines = [
        f"{plan['training_flops']:.3g} training FLOPs by {plan['metric']} of {plan['runs']} runs, "
        f"{describe_law(plan['form'], plan['link'])}; best size for new pairs, "
        f"in GMACs: {between(*plan['best_size'])}"
    ]
    if len(plan["averaged"]) > 1:
        laws = ", ".join(plan["averaged"])
        lines.append(f"predictions are the mean of {len(plan['averaged'])} laws: {laws}")
    for x in plan["options"]:
        error, low, high = x["error"], *x["interval"]
        name = "95%" if x["validated"] else "not validated"
        score = between(1 - error, 1 - high, 1 - low, ".1%", name)
        text = score if plan["is_score"] else between(error, low, high, ".4g", name)
        mark = f"; EXTRAPOLATES: {', '.join(x['outside'])}" if x["outside"] else ""
        seen, share = short(x["samples"]), f"best in {x['share']:.0%} of draws"
        lines.append(f"  {x['model']:16} {seen:>6} pairs  {text}, {share}{mark}")
    epochs, rate, price = plan["epochs"], plan["learning_rate"], plan["price"]
    lines += [
        f"plan: {plan['model']} on {short(plan['samples'])} pairs"
        + (f", {epochs:.2g} epochs of {short(plan['unique'])}" if epochs else ""),
        f"batch size: {plan['batch_size']:,}, {plan['steps']:,} steps",
        "learning rate: "
        + (between(rate["value"], *rate["interval"]) if rate else "none is known (--sweep)"),
        f"{plan['topology']} at {plan['mfu']:.0%} MFU (--mfu, --bound): {plan['hours']:,.3g} h, "
        f"{plan['chip_hours']:,.4g} chip-hours" + (f", price {price:,.0f}" if price else ""),
    ]
    return "\n".join([*lines, *(f"warning: {line}" for line in plan["warnings"])])
