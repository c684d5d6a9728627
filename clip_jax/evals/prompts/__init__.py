"""Published class names and prompt templates, and the sensitivity of accuracy to phrasing.

The data files are CLIP_benchmark's (see NOTICE), ImageNet's names and its 80 templates OpenAI's.
"""

import functools
import json
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from clip_jax.errors import InputError
from clip_jax.evals.ranks import cosines, top_k_accuracy
from clip_jax.storage.files import AnyPath

PLAIN_TEMPLATE = "a photo of a {c}."


@functools.cache
def _data(file: str) -> Any:
    return json.loads(resources.files(__name__).joinpath(file).read_text(encoding="utf-8"))


def class_names(data_set: str) -> list[str] | None:
    """Return the published class names in the order of the labels; None if there are none."""
    return _data("class_names.json").get(data_set)


def templates(data_set: str) -> list[str]:
    """Return the published templates, with `{c}` where the class goes, or a plain one."""
    return _data("templates.json").get(data_set) or [PLAIN_TEMPLATE]


def imagenet_wnids() -> list[str]:
    """Return the WordNet ids of ImageNet's classes in order; its folders have these names."""
    return _data("imagenet_wnids.json")


def fill(template: str, name: str) -> str:
    """Replace `{c}` or `{}` in a template with a class name."""
    return template.replace("{c}", name).replace("{}", name)


def read_text(path: AnyPath) -> str:
    """Read a text file. Raises InputError if it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error


def read_templates(path: AnyPath) -> list[str]:
    """Read one template per line. Raises InputError for a line without `{c}` for the class."""
    lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        if "{c}" not in line and "{}" not in line:
            raise InputError(
                f"{path}: template {number}, {line!r}, needs {{c}} for the class name."
            )
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
        "templates/mean": mean, "templates/spread": max(alone) - min(alone),
        "templates/ensemble": together, "templates/gain": together - mean,
    }, alone  # fmt: skip
