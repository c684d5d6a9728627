"""Published prompt templates and class names, and the sensitivity of accuracy to phrasing.

The templates are CLIP_benchmark's (see NOTICE), ImageNet's 80 templates are OpenAI's.
"""

import functools
import json
from importlib import resources

import numpy as np
from jaxtyping import Float, Int

from clip_jax.data.class_folders import class_names, imagenet_wnids
from clip_jax.errors import InputError
from clip_jax.evals.ranks import cosines, top_k_accuracy
from clip_jax.models.templates import check_template, fill
from clip_jax.storage.files import AnyPath, read_text

__all__ = [
    "PLAIN_TEMPLATE",
    "class_names",
    "ensemble",
    "fill",
    "imagenet_wnids",
    "read_templates",
    "sensitivity",
    "templates",
]

PLAIN_TEMPLATE = "a photo of a {c}."


@functools.cache
def _published() -> dict[str, list[str]]:
    content = resources.files(__name__).joinpath("templates.json").read_text(encoding="utf-8")
    return json.loads(content)


def templates(data_set: str) -> list[str]:
    """Return the published templates, with `{c}` where the class goes, or a plain one."""
    return _published().get(data_set) or [PLAIN_TEMPLATE]


def read_templates(path: AnyPath) -> list[str]:
    """Read one template per line. Raises InputError for a line without `{}` or `{c}`."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        check_template(line, f"{path}: template {number}")
    if not lines:
        raise InputError(f"{path} is empty; write one template per line: {PLAIN_TEMPLATE}")
    return lines


def ensemble(
    features: Float[np.ndarray, "templates classes E"],
) -> Float[np.ndarray, "classes E"]:
    """Average over templates and scale to unit length: the zero-shot classifier."""
    mean = features.mean(axis=0)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


def sensitivity(
    image_features: Float[np.ndarray, "B E"],
    labels: Int[np.ndarray, " B"],
    features: Float[np.ndarray, "templates classes E"],
) -> tuple[dict[str, float], list[float]]:
    """Return how much the phrasing matters: the mean top-1 accuracy of single templates, best minus
    worst, the accuracy of their ensemble, and its gain over the mean; and the single accuracies."""

    def accuracy(weights: Float[np.ndarray, "classes E"]) -> float:
        return top_k_accuracy(cosines(image_features, weights), labels)

    alone, together = [accuracy(weights) for weights in features], accuracy(ensemble(features))
    mean = float(np.mean(alone))
    return {
        "templates/mean": mean,
        "templates/spread": max(alone) - min(alone),
        "templates/ensemble": together,
        "templates/gain": together - mean,
    }, alone
