"""Write a model card: architecture, training and metrics of a folder's model.

A run's configuration and results are copied with its weights, as `training.json`.
"""

import json
from typing import Any

from clip_jax.checkpoints.retention import of_teacher, split_name
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.convert import model_folder, run
from clip_jax.convert.state_dict import flatten
from clip_jax.convert.weight_files import located
from clip_jax.convert.weights import Weights
from clip_jax.models.clip import count
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import read_json

NAME = "README.md"
FACTS_NAME = "training.json"
# Settings of a run that the card shows.
_TRAINING = (
    "data/source",
    "data/augment",
    "data/crop",
    "steps",
    "batch_size",
    "objective",
    "optim",
    "init_from",
    "branch_from",
    "seed",
)
# Metrics of speed in result.json, which the card does not show.
_TIMES = ("seconds/", "goodput", "memory", "input/")

_CARD = """\
---
license:  # fill in: the weights' licence, which follows from the data's
pipeline_tag: zero-shot-image-classification
tags: [clip, jax]
---

# {name}

{about}

## Use

{use}

## Model

{model}

## Training

{training}

## Numbers

{numbers}

## Licence

To be filled in by the publisher of the weights.{licence}
"""
_ABOUT = {
    None: "A CLIP model written by clip_jax: an image tower and a text tower with one embedding "
    "space.",
    "image": "An image tower written by clip_jax, without a text tower.",
    "text": "A text tower written by clip_jax, without an image tower.",
}


def training(source: AnyPath) -> dict[str, Any] | None:
    """Return `config` and `result` of a model's run; None if they are unknown."""
    if run.is_run(source):
        return {"config": read_run_config(source), "result": read_json(source / "result.json")}
    if source.is_dir() and (source / FACTS_NAME).is_file():
        return read_json(source / FACTS_NAME)
    return None


def write(folder: AnyPath, source: AnyPath, weights: Weights, use: str) -> None:
    """Write the card and `training.json` into a folder of the model's files."""
    is_run = weights.format == "run"  # which RUN@STEP names, too
    facts = training(source if is_run else located(source))
    if facts is not None:
        files.write_whole(folder / FACTS_NAME, json.dumps(facts, indent=1))
    files.write_whole(folder / NAME, card(folder.name, weights, facts, use))


def card(name: str, weights: Weights, facts: dict[str, Any] | None, use: str) -> str:
    """Return the card as Markdown; `use` says how to load the folder."""
    head = weights.config.image_head
    model = {
        "parameters": f"{count(weights.params):,}",
        "image tower": weights.config.vision.summary,
        "weights": _of_teacher(weights.path),
        "image head": None if head is None else f"dino.txt's, {head.depth} blocks on all tokens",
        **model_folder.manifest(weights),
    }
    if weights.head is not None:
        use += "\n\n`classifier.safetensors` has a row of `kernel` for each class in its metadata. "
        use += "Logits of an image are exp(logit_scale) · unit embedding · kernelᵀ."
    facts = facts or {}
    settings = flatten(facts.get("config", {}))
    training = {key: x for key, x in settings.items() if key.startswith(_TRAINING)}
    numbers = {
        key: f"{value:.4g}"
        for key, value in facts.get("result", {}).items()
        if isinstance(value, int | float) and not key.startswith(_TIMES)
    }
    tables = {"model": _table(model), "training": _table(training), "numbers": _table(numbers)}
    licence = "" if weights.only_tower == "text" else weights.config.vision.licence
    texts = {"about": _ABOUT[weights.only_tower], "licence": licence and f" {licence}"}
    return _CARD.format(name=name, use=use, **tables, **texts)


def _of_teacher(path: str) -> str | None:
    """Return which weights a run's name means, if it names those of the teacher."""
    _, which = split_name(files.as_path(path))
    if not of_teacher(which)[1]:
        return None
    return "those of the teacher: the image tower is a moving average, the rest is as trained"


def _table(rows: dict[str, Any]) -> str:
    cells = (
        f"| {key} | {str(value).replace('|', '/')} |"
        for key, value in rows.items()
        if value is not None
    )
    return "\n".join(["| | |", "|---|---|", *cells]) if rows else "Not known."
