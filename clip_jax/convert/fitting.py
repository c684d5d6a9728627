"""Weights from which a model of another config can start training: adapted, and checked to fit."""

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import jax
import numpy as np

from clip_jax.checkpoints.resume import differences
from clip_jax.convert.state_dict import flatten, param_shapes
from clip_jax.convert.weights import Weights, whole_model, with_context, with_input
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers.vocabulary import check_same
from clip_jax.display import say
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig, Params
from clip_jax.optim import Tower
from clip_jax.serialize import to_dict

# Settings of towers that no weights fix: sizes to which positions are adapted, and how, those of
# training, a ratio that shapes show, and the tokenizer, which `check_same` compares.
_ADAPTED = (
    *("image_size", "max_patches", "context_length", "patch_dropout", "batch_norm_group"),
    *("layer_scale", "mlp_ratio", "tokenizer", "kept_positions", "stretched_from"),
)


def starting_params(
    weights: Weights,
    config: CLIPConfig,
    towers: Sequence[Tower] = ("image", "text"),
    *,
    preprocess: Preprocess | None = None,
    allowed: Sequence[str] = (),
) -> Params:
    """Read float32 parameters from which a model of architecture `config` can start training.

    Position embeddings are adapted: the image tower's resized to its image size, the text tower's
    cut or stretched to its context length (`with_context`). With one tower, neither the other nor
    the logit scale is returned. Raises InputError, which names the first parameter of another
    shape, or the settings, except those `allowed`, with which the model and its `preprocess`
    compute something else.
    """
    if len(set(towers)) > 1:
        whole_model(weights)
    if weights.only_tower not in (None, *towers):
        raise InputError(
            f"{weights.path} holds the {weights.only_tower} tower alone; set --init-towers."
        )
    weights = with_input(weights, image_size=config.vision.image_size)
    where = f"init_from={weights.path!r}"
    if "text" in towers:
        check_same(config.text.tokenizer, weights.config.text.tokenizer, where)
        weights = with_context(weights, config.text.context_length, config.text.kept_positions)
    params, text = dict(weights.params), weights.params.get("text", {})
    if "text" in towers and "positional_embedding" in text:  # without those of a class token
        positions = text["positional_embedding"][: config.text.num_positions]
        params = params | {"text": text | {"positional_embedding": positions}}
    if len(set(towers)) < 2:
        tower_of = {"visual": "image", "batch_stats": "image", "text": "text"}
        if config.image_head is not None:
            tower_of["image_head"] = "image"  # if the weights have one
        params = {name: x for name, x in params.items() if tower_of.get(name) in towers}
    if config.init_logit_bias is None and params.pop("logit_bias", None) is not None:
        say(
            f"{where}: its logit bias is left out, since the model has none. A softmax loss "
            "ignores it; for a sigmoid loss set --model.init-logit-bias."
        )
    advice = "set --model to the same architecture, or initialise one tower by --init-towers"
    check_shapes(params, config, where, advice)
    advice = (
        "set --init-architecture to take them from the weights, set the fields of --model to the "
        "same values, or allow the differences by --init-differences with these names"
    )
    check_settings(weights, config, where, advice, towers, preprocess, allowed)
    return jax.tree.map(lambda x: np.asarray(x, np.float32), params)


def check_shapes(params: Params, config: CLIPConfig, where: str, advice: str) -> None:
    """Raise InputError unless these subtrees of a model's parameters are those of `config`."""
    shapes = param_shapes(config).items()
    needs = {name: x for name, x in shapes if name.split("/")[0] in params}
    has = {name: x.shape for name, x in sorted(flatten(params).items())}
    for name, got, needed in differences(has, needs)[:1]:
        got, needed = ("none" if x is None else x for x in (got, needed))
        raise InputError(f"{where} has {name} {got}, and the model needs {needed}; {advice}.")


def check_settings(
    weights: Weights,
    config: CLIPConfig,
    where: str,
    advice: str,
    towers: Sequence[Tower] = ("image", "text"),
    preprocess: Preprocess | None = None,
    allowed: Sequence[str] = (),
) -> None:
    """Raise InputError if a model of architecture `config` computes something else than these
    weights were trained for, though all shapes are the same; `allowed` are patterns of settings."""
    pixels = weights.preprocess
    trained = replace(weights.config, image_mean=pixels.mean, image_std=pixels.std)
    is_square = preprocess is not None and preprocess.max_patches is None  # else NaFlex's own
    has = _settings(trained, towers, pixels if is_square else None)
    needs = _settings(config, towers, preprocess if is_square else None)
    problems = [
        f"{name} is {before!r} in the weights and {now!r} in the model"
        for name, before, now in differences(has, needs)
        if not any(fnmatchcase(name, pattern) for pattern in allowed)
    ]
    if problems:
        raise InputError(f"{where}: {', '.join(problems)}; {advice}.")


def _settings(
    config: CLIPConfig, towers: Sequence[Tower], preprocess: Preprocess | None
) -> dict[str, Any]:
    """Return the settings that change what weights compute, and no shape, as a nested dict; those
    of a decoder all change shapes."""

    def of_tower(tower: Any) -> dict[str, Any]:
        return {name: x for name, x in to_dict(tower).items() if name not in _ADAPTED}

    settings: dict[str, Any] = {}
    if "image" in towers:
        settings["vision"] = of_tower(config.vision)
        settings |= {"image_mean": config.image_mean, "image_std": config.image_std}
        if preprocess is not None:
            names = ("resize_mode", "interpolation")
            settings["preprocess"] = {name: getattr(preprocess, name) for name in names}
    if "text" in towers:
        settings["text"] = of_tower(config.text)
    return settings
