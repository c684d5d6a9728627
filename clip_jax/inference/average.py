"""Average weights: model soups, weight-space ensembles (WiSE-FT) and task vectors."""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
from clip_jax.display import STYLE, plain
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals.catalog import data_sets
from clip_jax.evals.pictures import save
from clip_jax.evals.suite import SuiteConfig, SuiteEvalConfig, SuiteEvaluator
from clip_jax.inference.evaluate import encoder_of
from clip_jax.inference.loading import model_of, on_mesh, prompt_head
from clip_jax.serialize import to_dict
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

# Fields that may differ: they are of training, or formats record them in other words.
_FREE = (
    *("file", "dtype", "remat", "unroll", "attention", "patch_dropout", "layer_scale", "mlp_ratio"),
    *("init_logit_scale", "init_logit_bias", "image_mean", "image_std", "rules"),
)
_LOWER_IS_BETTER = ("median_rank", "templates/spread", "lambda")

Measure = Callable[[Weights], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class AverageConfig(SuiteConfig):
    """Average the weights of models of one architecture, or evaluate a curve between two."""

    # Models to average: run directories (RUN@STEP, RUN@best), model folders or weight files.
    models: tuple[AnyPath, ...]
    output: AnyPath  # Folder for the averaged model, or for curve.json and curve.png of --curve.
    # Weight of each model; they are divided by their sum. Empty: equal weights.
    weights: tuple[float, ...] = ()
    # Task arithmetic (arXiv:2212.04089): add to this model the differences of the others from it,
    # times --weights, by default 1 and possibly negative. None: an average.
    base: AnyPath | None = None
    # Greedy soup (arXiv:2203.05482): try the models from the best --metric on --dataset, a
    # validation set, to the worst; keep each that does not lower the metric of the average.
    greedy: bool = False
    # WiSE-FT (arXiv:2109.01903): evaluate (1 − α)·first + α·second on --dataset, such as the target
    # and shifted test sets, for these α. No model is written.
    curve: tuple[float, ...] = ()
    # Result to choose by, DATASET/METRIC. None: the first data set's acc1, by the classifier if
    # there is one.
    metric: str | None = None
    # Of runs with optim.ema_decay, take the moving average of the weights, not the last weights.
    ema: bool = True
    overwrite: bool = False  # Replace an existing output.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, curve="[0, 1]", weights="[-1e6, 1e6]")
        count, some = len(self.models), self.weights or (1.0,)
        if count < 1 + (self.base is None):
            raise InputError(f"an average needs two models, not {count}; name them before OUTPUT.")
        if self.weights and len(self.weights) != count:
            raise InputError(f"weights={self.weights} are not {count}, one for each model.")
        if not any(some) or (min(some) < 0 and self.base is None):
            raise InputError(f"weights={some} are all 0, or negative without a --base.")
        if (self.curve or self.greedy) and (self.base or self.weights or not self.dataset):
            raise InputError(
                "greedy and curve set the weights themselves and compare results on data sets: "
                "omit --weights and --base, and set --dataset, such as folder:PATH."
            )
        if self.curve and (count > 2 or self.greedy):
            raise InputError(f"curve joins two models, not {count}; omit the others and --greedy.")


def average(config: AverageConfig) -> dict[str, Any]:
    """Write the averaged model as a model folder, or evaluate a curve; return what was done.

    Raises InputError for models that do not fit each other, and says in what.
    """
    paths = (*config.models, *([config.base] if config.base else []))
    for path in paths:
        check_free(path, config.output, config.overwrite)
    files.check_destination(config.output, "average")
    opened = data_sets(config.dataset, config.data_dir, config.languages) if config.dataset else {}
    evaluator = SuiteEvaluator(config, opened, memory=SuiteEvalConfig.memory_mib << 20)
    measure = functools.partial(_results, config, evaluator)
    models = fitting([read_weights(path, ema=config.ema) for path in paths], paths)
    if config.curve:
        return _curve(config, models, measure)
    base = models.pop() if config.base else None
    weights = config.weights or (1.0,) * len(models)
    rows = [{"model": str(x), "weight": w} for x, w in zip(config.models, weights, strict=True)]
    if config.greedy:
        models, rows = _greedy(config, models, measure)
        weights = (1.0,) * len(models)
    averaged = combine(models, weights, base)
    write_weights(averaged, config.output, "clip-jax")
    card.write(config.output, config.output, averaged, TARGETS["clip-jax"].use)
    return {"output": str(config.output), "rows": rows}


def combine(
    models: Sequence[Weights], weights: Sequence[float], base: Weights | None = None
) -> Weights:
    """Return Σ wᵢ·θᵢ in float32, from left to right, with wᵢ divided by their sum in float64; with
    a base, base + Σ wᵢ·(θᵢ − base), with wᵢ as they are. A weight of 0 leaves a model out.

    The logit scale is averaged as it is stored, as a logarithm, and a classifier like the rest.
    """

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
    head = models[0].head and replace(models[0].head, kernel=sums.pop("classifier"))
    return replace(models[0], params=unflatten(sums), head=head, adapters=None)


def fitting(models: Sequence[Weights], paths: Sequence[AnyPath]) -> list[Weights]:
    """Return models that can be averaged: if one has a classifier, those without get the zero-shot
    one of its classes. Raises InputError that names what differs, or for BatchNorm.
    """
    head = next((x.head for x in models if x.head is not None), None)

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
        tokenizers = models[0].config.text.tokenizer, x.config.text.tokenizer
        check_same(*tokenizers, str(path), "Average models of one tokenizer.")
        if "batch_stats" in x.params:
            raise InputError(f"{path} has BatchNorm, whose statistics cannot be averaged.")
    return [
        replace(x, head=prompt_head(model_of(x), head.classes, head.templates))
        if head and not x.head
        else x
        for x in models
    ]


# ------------------------------------------------------------------ with results


def _results(config: AverageConfig, evaluator: SuiteEvaluator, x: Weights) -> dict[str, float]:
    """Return a model's results, DATASET/METRIC, first the one to choose by."""
    mesh = sharding.make_mesh(sharding.MeshConfig())
    values = dict(evaluator.run(encoder_of(on_mesh(x, mesh), mesh, "average")))
    kind = "/classifier/acc1" if x.head else "/acc1"
    metric = config.metric or next((name for name in values if name.endswith(kind)), "acc1")
    if metric not in values or metric.endswith(_LOWER_IS_BETTER):
        raise InputError(
            f"metric={metric!r} is no result of which a higher one is better; set --metric to one "
            f"of {', '.join(name for name in values if not name.endswith(_LOWER_IS_BETTER))}."
        )
    return {metric: values[metric]} | values


def _greedy(
    config: AverageConfig, models: Sequence[Weights], measure: Measure
) -> tuple[list[Weights], list[dict[str, Any]]]:
    """Return the models of the soup, and what each of all that were tried made of it."""
    alone = [next(iter(measure(model).items())) for model in models]
    kept, best, rows = [], -math.inf, []
    for i in sorted(range(len(models)), key=lambda i: -alone[i][1]):
        soup, (metric, value) = [*kept, models[i]], alone[i]
        if kept:
            value = measure(combine(soup, [1.0] * len(soup)))[metric]
        row = {"model": str(config.models[i]), metric: alone[i][1], "of the soup": value}
        rows.append(row | {"kept": value >= best})
        if value >= best:
            kept, best = soup, value
    return kept, rows


def _curve(config: AverageConfig, models: Sequence[Weights], measure: Measure) -> dict[str, Any]:
    """Evaluate the models between two; write `curve.json` and `curve.png`."""
    import matplotlib
    from matplotlib.figure import Figure

    rows: list[dict[str, float]] = []
    for alpha in sorted(set(config.curve)):
        rows.append({"alpha": alpha} | measure(combine(models, (1 - alpha, alpha))))
        files.write_whole(config.output / "curve.json", json.dumps(rows, indent=1))
    metric = [*rows[0]][1]
    kind = metric.partition("/")[2]
    names = [name for name in rows[0] if name.partition("/")[2] == kind]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, 3.5), layout="constrained")
        axes, alphas = figure.subplots(), [row["alpha"] for row in rows]
        for name in names:
            label = plain(name.partition("/")[0])
            axes.plot(alphas, [row[name] for row in rows], "o-", label=label)
        first, second = (plain(path.name) for path in config.models)
        axes.set(xlabel=f"α (0: {first}, 1: {second})", ylabel=kind)
        axes.legend()
        save(figure, config.output / "curve.png", dpi=150)
    best = max(rows, key=lambda row: row[metric])["alpha"]
    rows = [{name: row[name] for name in ("alpha", *names)} for row in rows]
    return {"output": str(config.output), "metric": metric, "best alpha": best, "rows": rows}
