"""Class names and templates as published, and what phrasing does to accuracy.

The data files are CLIP_benchmark's (see NOTICE), ImageNet's names and its 80 templates OpenAI's.
Sensitivity and greedy selection follow OpenAI's prompt-engineering notebook.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from jaxtyping import Float, Int

from clip_jax.errors import InputError
from clip_jax.storage.files import Place

PLAIN_TEMPLATE = "a photo of a {c}."


@functools.cache
def _data(file: str) -> dict[str, list[str]]:
    text = resources.files(__name__).joinpath(file).read_text(encoding="utf-8")
    return {name: list(dict.fromkeys(rows)) if file == "templates.json" else rows
            for name, rows in json.loads(text).items()}  # fmt: skip


def class_names(data_set: str) -> list[str] | None:
    """Return the published class names in the order of the labels; None where there are none."""
    return _data("class_names.json").get(data_set)


def templates(data_set: str) -> list[str] | None:
    """Return the published templates, with `{c}` where the class goes; None without any."""
    return _data("templates.json").get(data_set)


@functools.cache
def imagenet_wnids() -> list[str]:
    """Return WordNet's ids of ImageNet's classes, which are the names of its folders, in order."""
    text = resources.files(__name__).joinpath("imagenet_wnids.json").read_text()
    return json.loads(text)


def fill(template: str, name: str) -> str:
    """Put a class name where the template says `{c}` or `{}`."""
    return template.replace("{c}", name).replace("{}", name)


def read_templates(path: Place) -> list[str]:
    """Read one template a line. Raises InputError for a line without a place for the class."""
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from error
    lines = [line.strip() for line in content.splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        if "{c}" not in line and "{}" not in line:
            raise InputError(f"{path}: template {number}, {line!r}, says nowhere {{c}}.")
    if not lines:
        raise InputError(f"{path} is empty; it needs one template a line, such as {PLAIN_TEMPLATE}")
    return lines


def ensemble(
    features: Float[np.ndarray, "templates classes E"],
) -> Float[np.ndarray, "classes E"]:
    """Average over templates and scale to unit length: the zero-shot classifier."""
    mean = features.mean(axis=0)
    return mean / np.linalg.norm(mean, axis=1, keepdims=True)


@dataclass(frozen=True)
class Sensitivity:
    """How much the phrasing matters: top-1 accuracies."""

    of_template: dict[str, float]  # each alone
    ensemble: float  # of all of them

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.of_template.values())))

    @property
    def spread(self) -> float:
        """Best minus worst template."""
        return max(self.of_template.values()) - min(self.of_template.values())

    @property
    def gain(self) -> float:
        """What the ensemble adds to a template's mean accuracy."""
        return self.ensemble - self.mean

    def values(self) -> dict[str, float]:
        return {
            "templates/mean": self.mean, "templates/spread": self.spread,
            "templates/ensemble": self.ensemble, "templates/gain": self.gain,
        }  # fmt: skip


def sensitivity(
    image_features: Float[np.ndarray, "B E"],
    labels: Int[np.ndarray, " B"],
    features: Float[np.ndarray, "templates classes E"],
    templates: Sequence[str],
) -> Sensitivity:
    """Measure every template alone and all together."""
    alone = {
        template: _accuracy(image_features, labels, weights)
        for template, weights in zip(templates, features, strict=True)
    }
    return Sensitivity(alone, _accuracy(image_features, labels, ensemble(features)))


def greedy_selection(
    image_features: Float[np.ndarray, "B E"],
    labels: Int[np.ndarray, " B"],
    features: Float[np.ndarray, "templates classes E"],
) -> list[int]:
    """Choose templates for validation images: the best one, then whichever helps most, while any
    does. Returns their indices in that order."""
    chosen: list[int] = []
    best = -1.0
    while len(chosen) < len(features):
        rest = [i for i in range(len(features)) if i not in chosen]
        accuracies = [
            _accuracy(image_features, labels, ensemble(features[[*chosen, i]])) for i in rest
        ]
        if max(accuracies) <= best:
            break
        best = max(accuracies)
        chosen.append(rest[int(np.argmax(accuracies))])
    return chosen


def _accuracy(
    image_features: Float[np.ndarray, "B E"],
    labels: Int[np.ndarray, " B"],
    weights: Float[np.ndarray, "classes E"],
) -> float:
    return float(((image_features @ weights.T).argmax(axis=1) == labels).mean())
