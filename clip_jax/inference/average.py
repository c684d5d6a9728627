"""Average weights: model soups, weight-space ensembles (WiSE-FT) and task vectors."""

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from clip_jax import sharding
from clip_jax.checkpoints.resume import differences
from clip_jax.convert import card
from clip_jax.convert.conversion import check_free
from clip_jax.convert.formats import TARGETS, read_weights, write_weights
from clip_jax.convert.state_dict import flatten, unflatten
from clip_jax.convert.weights import Weights
from clip_jax.data.tokenizers.vocabulary import check_same
from clip_jax.display import plain, say
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals.catalog import data_sets
from clip_jax.evals.pictures import save
from clip_jax.evals.ranks import NotFinite
from clip_jax.evals.suite import SuiteConfig, SuiteEvalConfig, SuiteEvaluator
from clip_jax.inference.loading import model_of, on_mesh, prompt_head
from clip_jax.serialize import to_dict
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

# Fields that may differ: they are of training, or formats record them in other words.
_FREE = (
    *("file", "dtype", "remat", "unroll", "attention", "patch_dropout", "layer_scale", "mlp_ratio"),
    *("init_logit_scale", "init_logit_bias", "image_mean", "image_std", "rules"),
    *("kept_positions", "stretched_from"),
)


@dataclass(frozen=True, kw_only=True)
class AverageConfig(SuiteConfig):
    """Average the weights of models of one architecture, or evaluate a curve between two."""

    models: tuple[AnyPath, ...]  # Runs (RUN@STEP, RUN@best), model folders or weight files.
    output: AnyPath  # Folder for the averaged model, or for curve.json and curve.png of --curve.
    weights: tuple[float, ...] = ()  # Weight of each model, divided by their sum. Empty: equal.
    # Task arithmetic (arXiv:2212.04089): add the differences from this model to it, × --weights.
    base: AnyPath | None = None
    # Greedy soup (arXiv:2203.05482): from the best --metric on --dataset, a validation set, to the
    # worst, keep each model that does not lower the metric of the average.
    greedy: bool = False
    # WiSE-FT (arXiv:2109.01903): α for which (1 − α)·first + α·second is evaluated on --dataset.
    curve: tuple[float, ...] = ()
    # Result to choose by, DATASET/METRIC. None: acc1 of the first data set, by a classifier if any.
    metric: str | None = None
    ema: bool = True  # Read the moving average of the weights of runs with optim.ema_decay.
    overwrite: bool = False  # Replace an existing output.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, curve="[0, 1]", weights="[-1e6, 1e6]")
        count, weights = len(self.models), self.weights or (1.0,)
        if count < 1 + (self.base is None):
            raise InputError(f"an average needs two models, not {count}; name them before OUTPUT.")
        if self.weights and len(self.weights) != count:
            raise InputError(f"weights={weights} are not {count}, one for each model.")
        if not any(weights) or (min(weights) < 0 and self.base is None):
            raise InputError(f"weights={weights} must not be all 0, nor negative without --base.")
        if self.curve and (count > 2 or self.greedy):
            raise InputError(f"curve joins two models, not {count}; omit others and --greedy.")
        if (self.curve or self.greedy) and (self.base or self.weights or not self.dataset):
            raise InputError(
                "curve and greedy need --dataset, such as folder:PATH, and no --weights or --base."
            )
        if not self.curve and not self.greedy:
            names = ["metric", *(field.name for field in fields(SuiteConfig))]
            defaults = {field.name: field.default for field in fields(self)}
            ignored = [name for name in names if getattr(self, name) != defaults[name]]
            if ignored:
                raise InputError(
                    f"{', '.join(ignored)} would be ignored, since nothing is evaluated: add "
                    "--greedy or --curve, or leave them out."
                )


def average(config: AverageConfig) -> dict[str, Any]:
    """Write the averaged model as a model folder, or evaluate a curve; return what was done."""
    paths = (*config.models, *([config.base] if config.base else []))
    for path in paths:
        check_free(path, config.output, config.overwrite)
    files.check_destination(config.output, "OUTPUT")
    opened = data_sets(config.dataset, config.data_dir, config.languages) if config.dataset else {}
    evaluator = SuiteEvaluator(config, opened, memory=SuiteEvalConfig.memory_mib << 20)
    measure = functools.partial(_measure, config.metric, evaluator)
    models = fitting([read_weights(path, ema=config.ema) for path in paths], paths)
    if config.curve:
        return _curve(config, models, measure)
    base = models.pop() if config.base else None
    weights = config.weights or (1.0,) * len(models)
    result: dict[str, Any] = {"output": str(config.output)}
    rows = [{"model": str(x), "weight": w} for x, w in zip(config.models, weights, strict=True)]
    if config.greedy:
        measured = [measure(x) for x in models]
        result["metric"] = metric = _chosen_metric(measured)
        alone = [_score(values, metric) for _, values in measured]
        rows, ingredients, best = [], [], -math.inf
        for i in sorted(range(len(models)), key=lambda i: -alone[i]):
            soup = [*ingredients, models[i]]
            _, values = measure(combine(soup, [1.0] * len(soup)))
            value = _score(values, metric)
            is_better = math.isfinite(value) and value >= best
            singly, shared = (x.get(metric, math.nan) for x in (measured[i][1], values))
            row = {"alone": singly, "soup": shared, "kept": is_better}
            rows.append({"model": str(config.models[i])} | row)
            if is_better:
                ingredients, best = soup, value
        models, weights = ingredients, (1.0,) * len(ingredients)
    averaged = combine(models, weights, base)
    write_weights(averaged, config.output, "clip-jax")
    files.remove(config.output / card.FACTS_NAME)  # of a model that was there
    card.write(config.output, config.output, averaged, TARGETS["clip-jax"].use)
    return result | {"rows": rows}


def combine(
    models: Sequence[Weights], weights: Sequence[float], base: Weights | None = None
) -> Weights:
    """Return Σ wᵢ·θᵢ in float32, from left to right, with wᵢ divided by their sum in float64; with
    a base, base + Σ wᵢ·(θᵢ − base), with wᵢ as they are. A weight of 0 leaves a model out. The
    logit scale is averaged as it is stored, as a logarithm, and a classifier like the rest."""

    def arrays(x: Weights) -> dict[str, np.ndarray]:
        head = {} if x.head is None else {"classifier": x.head.kernel}
        return {n: np.asarray(a, np.float32) for n, a in (flatten(x.params) | head).items()}

    total = math.fsum(weights) if base is None else 1.0
    trees = [(np.float32(w / total), arrays(x)) for x, w in zip(models, weights, strict=True) if w]
    start, sums = {} if base is None else arrays(base), {}
    for name in trees[0][1]:
        terms = [w * (tree[name] - start[name] if start else tree[name]) for w, tree in trees]
        first = [start[name]] if start else []
        sums[name] = np.asarray(functools.reduce(np.add, [*first, *terms]))
    head = models[0].head and models[0].head._replace(kernel=sums.pop("classifier"))
    return replace(models[0], params=unflatten(sums), head=head, adapters=None)


def fitting(models: Sequence[Weights], paths: Sequence[AnyPath]) -> list[Weights]:
    """Return models that can be averaged: if one has a classifier, those without get the zero-shot
    one of its classes. Raises InputError that names what differs, or for BatchNorm."""
    head = next((x.head for x in models if x.head), None)
    biased = ["logit_bias" in x.params for x in models]
    if len(set(biased)) == 2:
        raise InputError(
            f"{paths[biased.index(True)]} has a logit bias, for probabilities by a sigmoid, and "
            f"{paths[biased.index(False)]} has none, for those by a softmax; choose models that "
            "were trained with one loss, both with SigmoidConfig or both without."
        )

    def facts(x: Weights) -> dict[str, Any]:
        shapes = {name: array.shape for name, array in flatten(x.params).items()}
        classes = dict(enumerate((x.head or head).classes)) if head else {}
        config, preprocess = to_dict(x.config), to_dict(x.preprocess)
        return {"model": config, "preprocess": preprocess, "shape": shapes, "class": classes}

    for path, x in zip(paths, models, strict=True):
        for what, a, b in differences(facts(models[0]), facts(x)):
            if what.rpartition(".")[2] not in _FREE:
                raise InputError(
                    f"{paths[0]} and {path} cannot be averaged: {what} is {a} and {b}. Choose "
                    "models of one architecture, tokenizer, preprocessing and set of classes."
                )
        check_same(models[0].config.text.tokenizer, x.config.text.tokenizer, str(path))
        if "batch_stats" in x.params:
            raise InputError(f"{path} has BatchNorm, whose statistics cannot be averaged.")
    heads = [head and (x.head or prompt_head(model_of(x), *head[:2])) for x in models]
    return [replace(x, head=head) for x, head in zip(models, heads, strict=True)]


def _measure(metric: str | None, evaluator: SuiteEvaluator, x: Weights) -> tuple[str, dict]:
    """Return the name of the result to choose by, and all results by name; none, with a warning,
    for a model whose embeddings are not finite."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    try:
        values = dict(evaluator.run(on_mesh(x, mesh).encoder(mesh, "average")))
    except NotFinite as error:
        say(f"a model is not chosen: {error}")
        return "", {}
    usual = (name for name in values if name.endswith("/acc1"))
    metric = metric or max(usual, key=lambda x: x.endswith("/classifier/acc1"), default="acc1")
    if metric not in values or metric.endswith(("median_rank", "templates/spread", "lambda")):
        raise InputError(
            f"metric={metric!r} must be a result that is better if higher, of {', '.join(values)}."
        )
    return metric, values


def _chosen_metric(measured: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    """Return the name of the result to choose by. Raises InputError unless a model has a finite
    one."""
    for metric, values in measured:
        if math.isfinite(_score(values, metric)):
            return metric
    raise InputError(
        "no model has a finite result to choose by; use models whose embeddings are finite, or "
        "choose another --metric."
    )


def _score(values: Mapping[str, float], metric: str) -> float:
    """Return the result to choose by, −inf for none or one that is not finite: the worst."""
    value = values.get(metric, math.nan)
    return value if math.isfinite(value) else -math.inf


def _curve(config: AverageConfig, models: Sequence[Weights], measure: Callable) -> dict[str, Any]:
    """Evaluate the models between two; write `curve.json` and `curve.png`.

    Of equal results the smallest α is the best.
    """
    from matplotlib.figure import Figure

    rows, measured = [], []
    for alpha in sorted(set(config.curve)):
        measured.append(measure(combine(models, (1 - alpha, alpha))))
        rows.append({"alpha": alpha, **measured[-1][1]})
        files.write_whole(config.output / "curve.json", json.dumps(rows, indent=1))
    metric = _chosen_metric(measured)
    best = max(rows, key=lambda row: _score(row, metric))["alpha"]
    results = dict.fromkeys(name for _, values in measured for name in values)
    names = [x for x in results if x.partition("/")[2] == metric.partition("/")[2]]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    rows = [{x: row.get(x, math.nan) for x in ("alpha", *names)} for row in rows]
    axes = figure.subplots()
    for name in names:
        values = [row[name] for row in rows]
        axes.plot([row["alpha"] for row in rows], values, "o-", label=plain(name.partition("/")[0]))
    first, second = (plain(path.name) for path in config.models)
    axes.set(xlabel=f"α (0: {first}, 1: {second})", ylabel=metric.partition("/")[2])
    axes.legend()
    save(figure, config.output / "curve.png", dpi=150)
    return {"output": str(config.output), "metric": metric, "best_alpha": best, "rows": rows}
