"""Our model folder: safetensors under our parameter paths, the configuration, and a manifest.

The manifest says in plain words what silently goes wrong elsewhere; on reading it has to agree with
the configuration.
"""

from pathlib import Path
from typing import Any

from clip_jax.convert.files import read_json, read_tensors, write_json, write_safetensors
from clip_jax.convert.state_dict import Row, flatten, param_shapes, to_params
from clip_jax.convert.weights import DType, TokenizerConfig, Weights, cast
from clip_jax.data.images import Preprocess
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.serialize import from_dict, to_dict

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MANIFEST_NAME = "manifest.json"
FORMAT = "clip-jax"
VERSION = 1


def manifest(weights: Weights) -> dict[str, Any]:
    """Return what a user of the weights has to know, as plain JSON values."""
    config, vision, text = weights.config, weights.config.vision, weights.config.text
    tokenizer = weights.tokenizer
    resnet = isinstance(vision, ResNetConfig)
    return {
        "format": FORMAT,
        "version": VERSION,
        "image_activation": "relu" if resnet else vision.activation,
        "text_activation": text.activation,
        "image_pooling": "attention" if resnet else vision.pool,
        "text_pooling": text.pool,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "context_length": tokenizer.context_length,
        "case_folding": tokenizer.clean != "whitespace",
        "text_cleaning": tokenizer.clean,
        "padding_id": tokenizer.pad_id,
        "image_size": weights.preprocess.image_size,
        "resize_mode": weights.preprocess.resize_mode,
        "interpolation": weights.preprocess.interpolation,
        "image_mean": list(weights.preprocess.mean),
        "image_std": list(weights.preprocess.std),
        "embed_dim": config.embed_dim,
        **({"batches_tracked": weights.batches_tracked} if weights.batches_tracked else {}),
    }


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write the folder; `dtype` None keeps every array's own."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {path: cast(x, dtype) for path, x in flatten(weights.params).items()}
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": FORMAT})
    write_json(folder / CONFIG_NAME, to_dict(weights.config))
    write_json(folder / MANIFEST_NAME, manifest(weights))


def is_folder(path: Path) -> bool:
    """Say whether a directory is one of these."""
    return (path / MANIFEST_NAME).is_file()


def read(folder: Path) -> Weights:
    """Read the folder. ValueError where the manifest and the configuration disagree."""
    said = read_json(folder / MANIFEST_NAME)
    if said.get("format") != FORMAT or said.get("version") != VERSION:
        raise ValueError(
            f"{folder / MANIFEST_NAME} is of format {said.get('format')!r}, version "
            f"{said.get('version')!r}; {FORMAT!r}, version {VERSION} is read."
        )
    content = read_json(folder / CONFIG_NAME)
    config = from_dict(CLIPConfig, content, str(folder / CONFIG_NAME))
    tensors = read_tensors(folder / WEIGHTS_NAME)
    table = [Row(path, path) for path in param_shapes(config)]
    params = to_params(table, tensors, config, str(folder / WEIGHTS_NAME))
    weights = Weights(
        config=config,
        params=params,
        preprocess=_from(said, folder, Preprocess, _PREPROCESS),
        tokenizer=_from(said, folder, TokenizerConfig, _TOKENIZER),
        batches_tracked=from_dict(
            int, said.get("batches_tracked", 0), f"{folder / MANIFEST_NAME}: batches_tracked"
        ),
    )
    for name, value in manifest(weights).items():
        if said.get(name) != value:
            raise ValueError(
                f"{folder / MANIFEST_NAME} says {name}={said.get(name)!r}, but {CONFIG_NAME} means "
                f"{value!r}; one of them was changed by hand."
            )
    if weights.preprocess.image_size != config.vision.image_size:
        raise ValueError(
            f"{folder / MANIFEST_NAME} says image_size={weights.preprocess.image_size}; the model "
            f"has {config.vision.image_size}."
        )
    return weights


_PREPROCESS = {
    "image_size": "image_size",
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "interpolation",
    "resize_mode": "resize_mode",
}
_TOKENIZER = {
    "name": "tokenizer",
    "vocab_size": "vocab_size",
    "context_length": "context_length",
    "clean": "text_cleaning",
    "pad_id": "padding_id",
}


def _from(said: dict[str, Any], folder: Path, kind: Any, names: dict[str, str]) -> Any:
    data = {field: said.get(name) for field, name in names.items()}
    return from_dict(kind, data, str(folder / MANIFEST_NAME))
