"""Average weights: model soups, weight-space ensembles (WiSE-FT) and task vectors."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from clip_jax import processes, sharding
from clip_jax.checkpoints.resume import differences
from clip_jax.convert import card
from clip_jax.convert.conversion import check_free
from clip_jax.convert.formats import TARGETS, read_weights, write_weights
from clip_jax.convert.state_dict import flatten, unflatten
from clip_jax.convert.weights import Head, Weights
from clip_jax.data.tokenizers.vocabulary import check_same
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.suite import SuiteConfig
from clip_jax.inference.evaluate import EvaluateConfig, Evaluators
from clip_jax.inference.loading import model_of, on_mesh, prompt_head
from clip_jax.serialize import to_dict
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath


@dataclass(frozen=True, kw_only=True)
class AverageConfig(SuiteConfig):
    """Average the weights of models of one architecture."""

    # Models to average: run directories (RUN@STEP, RUN@best), model folders or weight files.
    models: tuple[AnyPath, ...]
    output: AnyPath  # Folder for the averaged model, or for the results of --curve.
    # Weight of each model; they are divided by their sum. Empty: equal weights.
    weights: tuple[float, ...] = ()
    # Task arithmetic (arXiv:2212.04089): add the weighted differences of the models from this one.
    # The weights are then factors, which may be negative. None: an average.
    base: AnyPath | None = None
    # Greedy soup (arXiv:2203.05482): sort the models by --metric, and keep each that does not lower
    # it. Needs data sets to validate on.
    greedy: bool = False
    # WiSE-FT (arXiv:2109.01903): evaluate (1 − α)·first + α·second for these α, without writing a
    # model. Needs data sets, such as the target and shifted ones.
    curve: tuple[float, ...] = ()
    metric: str | None = None  # Result to choose and plot by, DATASET/METRIC. None: the first acc1.
    overwrite: bool = False  # Replace an existing output.
    mesh: sharding.MeshConfig = field(default_factory=sharding.MeshConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, curve="[0, 1]")
        count = len(self.models)
        if count < 1 + (self.base is None):
            raise InputError("an average needs two models; name them before the output.")
        if self.weights and len(self.weights) != count:
            raise InputError(f"weights={self.weights} are for {count} models; give one for each.")
        if (self.base is None and self.weights and min(self.weights) < 0) or not any(self._factors):
            raise InputError(
                f"weights={self.weights} must not be negative, nor all 0, without a --base."
            )
        if self.curve and (count != 2 or self.base or self.greedy or self.weights):
            raise InputError(
                "curve joins two models; omit --weights, --base and --greedy, and name two."
            )
        if self.greedy and (self.base or self.weights):
            raise InputError("a greedy soup weighs its models equally; omit --weights and --base.")
        if (self.greedy or self.curve) and not self.dataset:
            raise InputError(
                "greedy and curve compare results on data sets; set --dataset, such as folder:PATH."
            )

    @property
    def _factors(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.models)


def average(config: AverageConfig) -> dict[str, Any]:
    """Write the averaged model as a model folder, or evaluate a curve; return what was done.

    Raises InputError for models that do not fit each other, and says in what.
    """
    check_free(config.models[0], config.output, config.overwrite)
    paths = [*config.models, *([config.base] if config.base else [])]
    read = with_heads([read_weights(path) for path in paths])
    for path, other in zip(paths[1:], read[1:], strict=True):
        check_alike(read[0], other, str(paths[0]), str(path))
    measure = Measure(config)
    if config.curve:
        return curve(config, read, measure)
    models, names = read[: len(config.models)], [str(path) for path in config.models]
    result: dict[str, Any] = {"output": str(config.output)}
    if config.greedy:
        kept, result["metric"], result[measure.metric] = greedy(models, measure)
        models, names = [models[i] for i in kept], [names[i] for i in kept]
    base = read[-1] if config.base else None
    factors = (1.0,) * len(models) if config.greedy else config._factors
    averaged = combine(models, factors, base)
    write_weights(averaged, config.output, "clip-jax")
    card.write(config.output, config.output, averaged, TARGETS["clip-jax"].use)
    return result | {"models": names, "weights": list(factors)}


def combine(
    models: Sequence[Weights], factors: Sequence[float], base: Weights | None = None
) -> Weights:
    """Return Σ wᵢ·θᵢ in float32, from left to right, with wᵢ divided by their sum in float64; with
    a base, base + Σ wᵢ·(θᵢ − base), with wᵢ as they are. A weight of 0 leaves a model out.

    The logit scale is averaged as it is stored, as a logarithm. Raises InputError for BatchNorm,
    whose statistics are not those of averaged weights.
    """
    if base is None:
        total = sum(map(float, factors))
        factors = [float(x) / total for x in factors]
    several = [(model, x) for model, x in zip(models, factors, strict=True) if x]
    if "batch_stats" in several[0][0].params and len(several) + (base is not None) > 1:
        raise InputError(
            "a ResNet's BatchNorm statistics cannot be averaged with its weights; average vision "
            "transformers, or train the average for some steps with a small learning rate."
        )

    def mix(arrays: Sequence[np.ndarray], start: np.ndarray | None) -> np.ndarray:
        start = None if start is None else np.asarray(start, np.float32)
        sums = start
        for (_, factor), x in zip(several, arrays, strict=True):
            x = np.asarray(x, np.float32)
            term = np.float32(factor) * (x if start is None else x - start)
            sums = term if sums is None else sums + term
        return np.asarray(sums)

    trees = [flatten(model.params) for model, _ in several]
    begin = None if base is None else flatten(base.params)
    params = {
        name: mix([tree[name] for tree in trees], None if begin is None else begin[name])
        for name in trees[0]
    }
    first, head = several[0][0], several[0][0].head
    if head is not None:
        start = base.head.kernel if base is not None and base.head is not None else None
        kernels = [model.head.kernel for model, _ in several if model.head is not None]
        head = Head(head.classes, head.templates, mix(kernels, start))
    return replace(first, params=unflatten(params), head=head)


def with_heads(models: Sequence[Weights]) -> list[Weights]:
    """Give models without a classifier the zero-shot one of the classes that another has."""
    heads = [model.head for model in models if model.head is not None]
    if not heads:
        return list(models)
    first = heads[0]
    return [
        model
        if model.head is not None
        else replace(model, head=prompt_head(model_of(model), first.classes, first.templates))
        for model in models
    ]


def check_alike(one: Weights, other: Weights, name: str, other_name: str) -> None:
    """Raise InputError, which names the difference, unless two models can be averaged."""
    check_same(one.config.text.tokenizer, other.config.text.tokenizer, other_name)
    first, second = ({"model": to_dict(x.config), "preprocess": to_dict(x.preprocess)}
                     for x in (one, other))  # fmt: skip
    if one.head is not None and other.head is not None:
        first["classes"], second["classes"] = one.head.classes, other.head.classes
    trained = ("model.init_", "model.text.tokenizer.file", "model.dtype", "model.image_")
    for what, a, b in differences(first, second):
        if not what.startswith(trained):
            raise InputError(
                f"{name} and {other_name} cannot be averaged: {what} is {a} and {b}. Convert one "
                "of them, or average models of one architecture and preprocessing."
            )
    shapes = [{n: x.shape for n, x in flatten(model.params).items()} for model in (one, other)]
    for path in sorted(shapes[0].keys() | shapes[1].keys()):
        a, b = (each.get(path, "missing") for each in shapes)
        if a != b:
            raise InputError(f"{name} and {other_name} cannot be averaged: {path} is {a} and {b}.")


# ------------------------------------------------------------------ with results


class Measure:
    """Evaluates weights on the data sets of a config."""

    def __init__(self, config: AverageConfig) -> None:
        own = {x.name: getattr(config, x.name) for x in fields(SuiteConfig)}
        self._config = EvaluateConfig(model=config.models[0], suite="clip", **own)
        self._evaluators: Evaluators | None = None
        self._mesh = config.mesh
        self.metric = config.metric or ""

    def __call__(self, weights: Weights) -> dict[str, float | int]:
        """Return all results by name. Raises InputError if the metric is not among them."""
        if self._evaluators is None:
            self._evaluators = Evaluators(self._config, None)
        mesh = sharding.make_mesh(self._mesh)
        model = on_mesh(weights, mesh)
        encoder = Encoder(
            model.clip, model.params, mesh, model.image_preprocess,
            lambda texts: model.tokenize(texts, True), "average", model.head,
        )  # fmt: skip
        values = self._evaluators.run(encoder, None)
        kind = "/classifier/acc1" if weights.head is not None else "/acc1"
        self.metric = self.metric or next((name for name in values if name.endswith(kind)), "acc1")
        if self.metric not in values:
            raise InputError(
                f"metric={self.metric!r} is not among the results {', '.join(values)}; set "
                "--metric to one of them."
            )
        return values


def greedy(models: Sequence[Weights], measure: Measure) -> tuple[list[int], str, float]:
    """Return the models of a greedy soup, best first, the metric's name and the soup's value."""
    results = [float(measure(model)[measure.metric]) for model in models]
    order = sorted(range(len(models)), key=lambda i: -results[i])
    kept, best = order[:1], results[order[0]]
    for i in order[1:]:
        tried = [models[j] for j in (*kept, i)]
        value = float(measure(combine(tried, [1.0] * len(tried)))[measure.metric])
        if value >= best:
            kept, best = [*kept, i], value
    return kept, measure.metric, best


def curve(config: AverageConfig, models: Sequence[Weights], measure: Measure) -> dict[str, Any]:
    """Evaluate the models between two; write `curve.json`, `curve.csv` and `curve.png`."""
    rows: list[dict[str, Any]] = []
    for alpha in config.curve:
        rows.append({"alpha": alpha} | measure(combine(models, (1 - alpha, alpha))))
        if processes.is_lead():
            files.write_whole(config.output / "curve.json", json.dumps(rows, indent=1))
    text = io.StringIO()
    table = csv.DictWriter(text, [*rows[0]])
    table.writeheader()
    table.writerows(rows)
    files.write_whole(config.output / "curve.csv", text.getvalue())
    plot(rows, measure.metric, config.output / "curve.png")
    best = max(rows, key=lambda row: row[measure.metric])
    return {"output": str(config.output), "metric": measure.metric, "best": best, "curve": rows}


def plot(rows: Sequence[Mapping[str, Any]], metric: str, path: AnyPath) -> None:
    """Draw the metric of every data set over α."""
    from matplotlib.figure import Figure

    kind = metric.partition("/")[2]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    alphas = [row["alpha"] for row in rows]
    for name in rows[0]:
        if name.partition("/")[2] == kind:
            axes.plot(alphas, [row[name] for row in rows], marker="o", label=name.partition("/")[0])
    axes.set(xlabel="α (0: first model, 1: second)", ylabel=kind)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=150)
    files.write_whole(path, picture.getvalue())
