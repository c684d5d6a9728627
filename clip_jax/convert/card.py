"""A model card: what a folder's model was trained on, how, and with which numbers.

A run's configuration and results go with its weights as `training.json`, from folder to folder.
"""

import json
from typing import Any

from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.convert import run
from clip_jax.convert.weights import Weights
from clip_jax.models.clip import count
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import read_json

NAME = "README.md"
FACTS_NAME = "training.json"
# Of result.json: how fast it was, not how good.
_TIMES = ("seconds/", "goodput", "memory", "input/")

_CARD = """\
---
license:  # fill in: the weights' licence, which follows from the data's
pipeline_tag: zero-shot-image-classification
tags: [clip, jax]
---

# {name}

A CLIP written by clip_jax: an image tower and a text tower with one embedding space.

## Use

{use}

## Model

{model}

## Training

{training}

## Numbers

{numbers}

## Licence

To be filled in by who publishes the weights.
"""


def training(source: AnyPath) -> dict[str, Any] | None:
    """Return `config` and `result` of the run that a model comes from; None where nothing says."""
    if run.is_run(source):
        result = source / "result.json"
        return {
            "config": read_run_config(source),
            "result": read_json(result) if result.is_file() else {},
        }
    if source.is_dir() and (source / FACTS_NAME).is_file():
        return read_json(source / FACTS_NAME)
    return None


def write(folder: AnyPath, source: AnyPath, weights: Weights, use: str) -> None:
    """Write the card, and what it is made of, into a folder of the model's files."""
    facts = training(source)
    if facts is not None:
        files.write_whole(folder / FACTS_NAME, json.dumps(facts, indent=1))
    files.write_whole(folder / NAME, card(folder.name, weights, facts, use))


def card(name: str, weights: Weights, facts: dict[str, Any] | None, use: str) -> str:
    """Return the card's Markdown. `use` says how the folder is read."""
    history = "Nothing in the files that it came from says."
    if facts is not None:
        history = _table(_training(facts.get("config", {})))
    numbers = {
        key: f"{value:.4g}"
        for key, value in (facts or {}).get("result", {}).items()
        if isinstance(value, int | float) and not key.startswith(_TIMES)
    }
    return _CARD.format(
        name=name,
        use=use,
        model=_table(_model(weights)),
        training=history,
        numbers=_table(numbers) if numbers else "None are known.",
    )


def _table(rows: dict[str, Any]) -> str:
    cells = (f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *cells])


def _model(weights: Weights) -> dict[str, Any]:
    config, preprocess, text = weights.config, weights.preprocess, weights.config.text
    tokenizer = text.tokenizer
    return {
        "parameters": f"{count(weights.params):,}",
        "embedding": f"{config.embed_dim} dimensions",
        "image tower": config.vision.summary,
        "text tower": f"width {text.width}, depth {text.depth}, {text.context_length} tokens, "
        f"{text.activation}, {text.pool} pooling",
        "images": f"{preprocess.image_size} pixels, {preprocess.resize_mode}, "
        f"{preprocess.interpolation}, rules of {preprocess.rules}; mean {preprocess.mean}, "
        f"deviation {preprocess.std}",
        "texts": f"{text.vocab_size:,} ids, cleaning {tokenizer.clean}, padding on the "
        f"{tokenizer.pad_side} with {tokenizer.pad_id}",
    }


def _training(config: dict[str, Any]) -> dict[str, Any]:
    """What of a run's configuration a reader of its weights wants to know."""
    data, optim = (config.get(name) or {} for name in ("data", "optim"))
    steps, batch = config.get("steps", 0), config.get("batch_size", 0)
    schedule = (optim.get("schedule") or {}).get("type", "")
    return {
        "data": _settings(data.get("source") or {}),
        "pairs seen": f"{steps * batch:,} ({steps:,} steps of {batch:,})",
        "loss": "; ".join(map(_settings, config.get("objective") or [])),
        "optimizer": _settings(optim) + (f", {schedule.lower()} schedule" if schedule else ""),
        "augmentation": f"crop {data.get('crop')}, {_settings(data.get('augment') or {})}",
        "began with": config.get("branch_from") or config.get("init_from") or "random weights",
        "seed": config.get("seed"),
    }


def _settings(values: dict[str, Any]) -> str:
    """Name a dataclass of the configuration and its plain fields."""
    kind = str(values.get("type", "")).removesuffix("Config").removesuffix("Source")
    plain = [
        f"{name}={value}"
        for name, value in values.items()
        if name != "type" and value is not None and not isinstance(value, dict | list)
    ]
    return " ".join([kind, *([f"({', '.join(plain)})"] if plain else [])])
