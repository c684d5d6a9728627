"""Plan a run for a budget: a scaling law divides it between the model's size and pairs seen.

The batch size comes from the table's runs, the learning rate from a sweep. Hours and cost follow
from an assumed MFU or, with `compile`, from its bound, as in `clip-jax plan`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from clip_jax.errors import InputError, check_ranges
from clip_jax.losses import CaptionConfig, SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.pods import plan as pods
from clip_jax.pods.topology import Topology
from clip_jax.scaling import run_table
from clip_jax.scaling.choose import ChooseConfig, choose, fit_rule
from clip_jax.scaling.fit import FitConfig
from clip_jax.scaling.laws import TRAINING_FLOPS, Additive, Batched, Numbers, Runs
from clip_jax.scaling.run_table import RunTable, gmacs, is_score, number, parse_count, short, text
from clip_jax.scaling.uncertainty import Fit, Form, sizes_of
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import read_json

EPOCHS = 4  # up to which repeated pairs are worth almost as much as new ones (arXiv:2305.16264)


@dataclass(frozen=True, kw_only=True)
class ScalePlanConfig:
    """Plan a run for a budget, by a law that is fitted to a table of runs."""

    table: AnyPath = Path("scaling.csv")  # Table of runs (CSV), as written by `scale collect`.
    # Training FLOPs (1e21), chip-hours (300chip-hours), or money (5000usd, with chip_hour_price).
    budget: str = "1e21"
    # Pod to train on: TPUs such as v5e:16x16 or v5e:16x16/slices=2, or GPUs such as H100:64.
    topology: Annotated[Topology, pods.AsText] = pods.V5E
    chip_hour_price: float | None = None  # Price of one chip-hour, in any currency. None: no price.
    mfu: float = 0.4  # Assumed MFU (0 to 1) for hours and price, unless its bound is lower.
    # Compile the training step to bound its MFU and to find the remat that fits into memory.
    compile: bool = False
    metric: str = "imagenet1k_acc1"  # Column with the result of each run.
    # What the metric is: the error is 1 − score. None: the name decides, as in `scale fit`.
    metric_is: Literal["score", "error"] | None = None
    where: tuple[str, ...] = ()  # Conditions that a row must match, such as data=LAION*.
    columns: tuple[str, ...] = ()  # Columns of another program's table, as in `scale collect`.
    form: Form = "additive"  # Form of the law in size and pairs: additive, repeated or batched.
    draws: int = 1_000  # Number of bootstrap draws for the 95% intervals.
    candidates: tuple[str, ...] = ()  # Models to choose from. Empty: the table's.
    unique: str | None = None  # Number of distinct pairs, such as 400M. None: no pair is repeated.
    # None: the best of the form batched, else that of the run with the nearest number of pairs.
    batch_size: int | None = None
    # Source of the learning rate: output of `scale choose --json` (.json), or a table of all trials
    # of a sweep with the metric. None: no learning rate.
    sweep: AnyPath | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self, chip_hour_price="(0, inf)", mfu="(0, 1]", draws="[100, 1000000]",
            batch_size="[2, inf)",
        )  # fmt: skip
        if self.form == "repeated" and self.unique is None:
            raise InputError("form=repeated needs the number of distinct pairs; set --unique.")
        self.training_flops(self.mfu)  # raises for a budget that cannot be read

    def chip_hours(self, training_flops: float, mfu: float) -> float:
        return training_flops / (self.topology.chip.peak_flops * mfu) / 3600

    def training_flops(self, mfu: float) -> float:
        """Return the training FLOPs that the budget pays for at an MFU."""
        text = self.budget.replace("e+", "e")
        match = re.fullmatch(r"(?=.*[1-9])(\d[\d.]*(?:e\d+|[KMB])?)(|chip-hours|usd|eur)", text)
        amount, unit = (parse_count(match[1]), match[2]) if match else (0.0, "")
        price = self.chip_hour_price if unit in ("usd", "eur") else 1.0
        if not amount or price is None:
            raise InputError(
                f"budget={self.budget!r} must be training FLOPs such as 1e21, 300chip-hours, or "
                f"5000usd with --chip-hour-price, the price of one {self.topology.chip.name} hour."
            )
        return amount / price / self.chip_hours(1.0, mfu) if unit else amount


# ------------------------------------------------------------------ the choice of a model


def choices(
    fitted: Fit, sizes: Mapping[str, float], budget: float, third: Numbers | None = None
) -> list[dict[str, Any]]:
    """Return every model at the pairs that a budget of training FLOPs pays for, the best first.

    `sizes` are forward GMACs of a pair by model; `third` is the law's third quantity, one for all
    models or one each. `share` is that of the draws in which an option is the best; `outside` says
    how it lies outside the runs. Raises InputError for a law of compute alone.
    """
    if not isinstance(fitted.law, Additive):
        raise InputError(
            "a law of compute alone cannot divide a budget between size and pairs; set --form to "
            "additive, repeated or batched."
        )
    size = np.array([*sizes.values()])
    samples = budget / TRAINING_FLOPS / size
    third = None if third is None else np.broadcast_to(third, size.shape)
    predicted = np.stack(fitted.predict(size, samples, third)).T.tolist()
    for name, *run in zip(sizes, size.tolist(), samples.tolist(), strict=True):
        if lacking := fitted.unknown(*run):
            raise InputError(
                f"these runs predict no {name} of {short(run[1])} pairs; add {lacking}."
            )
    best = fitted.draws(size, samples, third).argmin(axis=1)
    options = [
        {
            "model": name, "size": size[i].item(), "samples": samples[i].item(),
            "error": predicted[i][0], "interval": predicted[i][1:],
            "share": (best == i).mean().item(),
            "outside": _outside(fitted.runs, size[i], samples[i]),
        }
        for i, name in enumerate(sizes)
    ]  # fmt: skip
    return sorted(options, key=lambda option: option["error"])


def _outside(runs: Runs, size: Numbers, samples: Numbers) -> list[str]:
    """Say which quantities lie outside those of the runs, and by what factor."""
    values = (size * samples, runs.compute), (size, runs.size), (samples, runs.samples)
    marks = []
    for name, (value, measured) in zip(("compute", "size", "pairs"), values, strict=True):
        if value > 1.005 * measured.max():  # runs see complete batches
            marks.append(f"{name} {value / measured.max():.3g} × the largest")
        elif 1.005 * value < measured.min():
            marks.append(f"{name} {value / measured.min():.3g} × the smallest")
    return marks


# ------------------------------------------------------------------ the plan


def plan(config: ScalePlanConfig, compile_: pods.Compile | None = None) -> dict[str, Any]:
    """Return the best model with its settings, time and price, and all options, as JSON values.

    `compile_` is that of `pods.plan.plan`. Raises InputError for a table, a budget or a sweep that
    gives no answer.
    """
    law = FitConfig(
        metric=config.metric, metric_is=config.metric_is, form=config.form, draws=config.draws
    )
    table = run_table.read(config.table, config.columns).select(config.metric, config.where)
    fitted = law.fit(law.runs(table))
    own = {row["arch"]: number(row, "gmacs_per_sample") for row in table.rows}
    sizes = {x: own[x] if x in own else gmacs(zoo.get(x)) for x in config.candidates or own}
    unique = parse_count(config.unique) if config.unique else None

    def ranked(mfu: float) -> list[dict[str, Any]]:
        budget, third = config.training_flops(mfu), unique if config.form == "repeated" else None
        if config.form == "batched":
            samples = (budget / TRAINING_FLOPS / size for size in sizes.values())
            third = np.array([_batch_size(config, table, fitted, x) for x in samples])
        return choices(fitted, sizes, budget, third)

    options, mfu, pod = ranked(config.mfu), config.mfu, None
    best = options[0]
    batch_size = _batch_size(config, table, fitted, best["samples"])
    if batch_size is None and (config.compile or config.sweep):
        raise InputError(
            "compile and sweep need a batch size, but the table has no column global_batch; set "
            "--batch-size."
        )
    if config.compile and batch_size:
        pod = _compiled(config, zoo.get(best["model"]), batch_size, compile_)
        options, mfu = ranked(pod.mfu), pod.mfu
        best = next(option for option in options if option["model"] == best["model"])
    rate = config.sweep and batch_size and _learning_rate(config, table, best["model"], batch_size)
    compute = best["size"] * best["samples"]
    optimum = fitted.best(np.array([compute]), sizes_of([fitted]))["size"]
    chip_hours = config.chip_hours(compute * TRAINING_FLOPS, mfu)
    result = best | {
        "metric": config.metric, "is_score": law.is_score, "form": config.form,
        "runs": len(fitted.runs.error), "training_flops": compute * TRAINING_FLOPS,
        "best_size": np.concatenate(optimum).tolist(),
        "unique": unique, "epochs": unique and best["samples"] / unique, "batch_size": batch_size,
        "steps": batch_size and max(round(best["samples"] / batch_size), 1),
        "learning_rate": rate,
        "topology": str(config.topology), "mfu": mfu, "remat": pod and pod.remat,
        "fits": pod and pod.fits, "chip_hours": chip_hours,
        "hours": chip_hours * config.topology.chip.devices / config.topology.devices,
        "price": config.chip_hour_price and chip_hours * config.chip_hour_price,
        "options": options,
    }  # fmt: skip
    return result | {"warnings": [*fitted.misfit(), *_warnings(result)]}


def _batch_size(
    config: ScalePlanConfig, table: RunTable, fitted: Fit, samples: float
) -> int | None:
    """Return the config's batch size, the law's best, or that of the run of the nearest length."""
    rows = [row for row in table.rows if text(row, "global_batch")]
    if config.batch_size or not rows:
        return config.batch_size
    law, devices = fitted.law, config.topology.devices
    if isinstance(law, Batched) and not (fitted.lacking("negatives") or fitted.lacking("steps")):
        return max(round(float(law.batch_to_use(samples)) / devices), 1) * devices
    nearest = min(rows, key=lambda row: abs(np.log(number(row, "samples_seen") / samples)))
    return int(number(nearest, "global_batch"))


def _compiled(
    config: ScalePlanConfig, model: CLIPConfig, batch_size: int, compile_: pods.Compile | None
) -> pods.Plan:
    """Plan the training step with the cheapest remat that fits, or the last one."""
    objective = (SoftmaxConfig(), CaptionConfig()) if model.decoder else (SoftmaxConfig(),)
    run = pods.PlanConfig(
        objective=objective, batch_size=batch_size, mfu=config.mfu, topology=config.topology
    )
    for remat in pods.REMAT:
        (planned,) = pods.plan(replace(run, model=replace(model, remat=remat)), compile_)
        if planned.fits:
            break
    return planned


def _learning_rate(
    config: ScalePlanConfig, table: RunTable, model: str, batch_size: int
) -> dict[str, Any]:
    """Predict the learning rate by the rule of the sweep's optima, those of all widths."""
    assert config.sweep is not None
    if config.sweep.suffix == ".json":
        if not config.sweep.is_file():
            raise InputError(f"there is no {config.sweep}; `scale choose --json` prints one.")
        points = read_json(config.sweep, "points")["points"]
    else:
        best = "max" if is_score(config.metric, config.metric_is) else "min"
        trials = ChooseConfig(table=config.sweep, choose_by=config.metric, report="lr", best=best)
        points = choose(trials)["points"]
    optima = [(x["width"], x["global_batch"], rate) for x in points for rate in x["optima"]]
    if (rule := fit_rule(*zip(*optima, strict=True)) if optima else None) is None:
        raise InputError(
            f"{config.sweep} has too few optima for a rule: it needs three or more, of two or more "
            "widths; extend the sweep, or leave out --sweep."
        )
    widths = {row["arch"]: text(row, "width") for row in table.rows}
    run = float(widths.get(model) or zoo.get(model).vision.width), batch_size
    value, *interval = rule.predict(*run)
    swept = zip(("width", "batch"), run, zip(*optima, strict=True), strict=False)
    outside = [f"{name} {x:g}" for name, x, xs in swept if not min(xs) <= x <= max(xs)]
    return {"value": value, "interval": interval, "outside": outside}


def _warnings(plan: Mapping[str, Any]) -> list[str]:
    epochs, rate, lines = plan["epochs"] or 0, plan["learning_rate"] or {}, []
    if outside := [*plan["outside"], *(f"sweep: {x}" for x in rate.get("outside", ()))]:
        lines.append(f"the plan extrapolates, as if its laws held there: {', '.join(outside)}.")
    if epochs > EPOCHS and plan["form"] != "repeated":
        lines.append(
            f"each pair is seen {epochs:.1f} times. Beyond {EPOCHS} epochs, repeated pairs are "
            "worth less than new ones (arXiv:2305.16264), which only the form repeated counts."
        )
    return lines + ["the step does not fit into memory."] * (plan["fits"] is False)


# ------------------------------------------------------------------ for a terminal


def describe(plan: Mapping[str, Any]) -> str:
    """Format a plan as text."""

    def between(value: float, low: float, high: float, form: str = ".3g") -> str:
        return f"{value:{form}} (95%: {low:{form}} to {high:{form}})"

    lines = [
        f"{plan['training_flops']:.3g} training FLOPs by the {plan['form']} law of "
        f"{plan['metric']} through {plan['runs']} runs; best size for new pairs, "
        f"in GMACs: {between(*plan['best_size'])}"
    ]
    for x in plan["options"]:
        error, low, high = x["error"], *x["interval"]
        score = between(1 - error, 1 - high, 1 - low, ".1%")
        text = score if plan["is_score"] else between(error, low, high, ".4g")
        mark = f"; EXTRAPOLATES: {', '.join(x['outside'])}" if x["outside"] else ""
        seen, share = short(x["samples"]), f"best in {x['share']:.0%} of draws"
        lines.append(f"  {x['model']:16} {seen:>6} pairs  {text}, {share}{mark}")
    epochs, rate, batch = plan["epochs"], plan["learning_rate"], "none is known (--batch-size)"
    if plan["batch_size"]:
        batch = f"{plan['batch_size']:,}, {plan['steps']:,} steps"
    by = f"compiled, remat {plan['remat']}" if plan["remat"] else "assumed"
    lines += [
        f"plan: {plan['model']} on {short(plan['samples'])} pairs"
        + (f", {epochs:.2g} epochs of {short(plan['unique'])}" if epochs else ""),
        f"batch size: {batch}",
        "learning rate: "
        + (between(rate["value"], *rate["interval"]) if rate else "none is known (--sweep)"),
        f"{plan['topology']} at {plan['mfu']:.0%} MFU ({by}): {plan['hours']:,.3g} h, "
        f"{plan['chip_hours']:,.4g} chip-hours"
        + ("" if plan["price"] is None else f", price {plan['price']:,.0f}"),
    ]
    return "\n".join([*lines, *(f"warning: {line}" for line in plan["warnings"])])
