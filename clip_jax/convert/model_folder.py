"""Our model folder: safetensors under our parameter paths, the configuration, and a manifest.

The manifest says in plain words what silently goes wrong elsewhere; on reading it has to agree with
the configuration.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_jax.convert.settings import read_json, write_json
from clip_jax.convert.state_dict import Row, flatten, param_shapes, to_params
from clip_jax.convert.tensor_files import read_tensors, write_safetensors
from clip_jax.convert.weights import DType, Weights, cast
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers import vocabulary
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TokenizerConfig
from clip_jax.serialize import from_dict, to_dict

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MANIFEST_NAME = "manifest.json"
FORMAT = "clip-jax"
VERSION = 2


def _kept_name(tokenizer: TokenizerConfig) -> str:
    """Return the name of a vocabulary in the folder, or what stands for CLIP's or for none."""
    return (
        tokenizer.file.rpartition("/")[2] if tokenizer.file not in ("", "clip") else tokenizer.file
    )


def manifest(weights: Weights) -> dict[str, Any]:
    """Return what a user of the weights has to know, as plain JSON values."""
    config, vision, text = weights.config, weights.config.vision, weights.config.text
    tokenizer = text.tokenizer
    own = tokenizer.file == "clip"
    resnet = isinstance(vision, ResNetConfig)
    return {
        "format": FORMAT,
        "version": VERSION,
        "image_activation": "relu" if resnet else vision.activation,
        "text_activation": text.activation,
        "image_pooling": "attention" if resnet else vision.pool,
        "text_pooling": text.pool,
        "tokenizer": _kept_name(tokenizer) or "missing",
        "vocab_size": text.clip_vocab_size if own else text.vocab_size,
        "context_length": text.context_length,
        "case_folding": tokenizer.clean not in ("none", "whitespace"),
        "text_cleaning": tokenizer.clean,
        "begin_id": text.begin_id,
        "end_id": text.end_id,
        "padding_id": tokenizer.pad_id,
        "padding_side": tokenizer.pad_side,
        "cut": tokenizer.cut,
        "image_size": weights.preprocess.image_size,
        "resize_mode": weights.preprocess.resize_mode,
        **({"fill": weights.preprocess.fill} if weights.preprocess.fill else {}),
        **({"pixel_rules": rules} if (rules := weights.preprocess.rules) != "openai" else {}),
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
    tokenizer = weights.config.text.tokenizer
    kept = replace(tokenizer, file=vocabulary.keep(tokenizer, str(folder)))
    config = replace(weights.config, text=replace(weights.config.text, tokenizer=kept))
    write_json(folder / CONFIG_NAME, to_dict(config))
    write_json(folder / MANIFEST_NAME, manifest(replace(weights, config=config)))


def is_folder(path: Path) -> bool:
    """Say whether a directory is one of these."""
    return (path / MANIFEST_NAME).is_file()


def read(folder: Path) -> Weights:
    """Read the folder. Raises InputError where the manifest and the configuration disagree."""
    said = read_json(folder / MANIFEST_NAME)
    if said.get("format") != FORMAT or said.get("version") not in (1, VERSION):
        raise InputError(
            f"{folder / MANIFEST_NAME} is of format {said.get('format')!r}, version "
            f"{said.get('version')!r}; {FORMAT!r}, versions 1 and {VERSION} are read."
        )
    content = read_json(folder / CONFIG_NAME)
    config = from_dict(CLIPConfig, content, str(folder / CONFIG_NAME))
    file = config.text.tokenizer.file
    if file not in ("", "clip", *vocabulary.NAMES):
        raise InputError(
            f"{folder / CONFIG_NAME}: text.tokenizer.file={file!r:.99}; it is one of "
            f"{', '.join(vocabulary.NAMES)}, beside it."
        )
    tensors = read_tensors(folder / WEIGHTS_NAME)
    table = [Row(path, path) for path in param_shapes(config)]
    params = to_params(table, tensors, config, str(folder / WEIGHTS_NAME))
    weights = Weights(
        config=config,
        params=params,
        preprocess=_from(said, folder, Preprocess, _PREPROCESS),
        batches_tracked=from_dict(
            int, said.get("batches_tracked", 0), f"{folder / MANIFEST_NAME}: batches_tracked"
        ),
    )
    if said["version"] == 1 and said.get("tokenizer") != "clip":  # which was named, and not kept
        missing = replace(config.text.tokenizer, file="")
        config = replace(config, text=replace(config.text, tokenizer=missing))
    for name, value in manifest(weights).items():
        if said.get(name) != value and not (said["version"] == 1 and name in _SINCE_2):
            raise InputError(
                f"{folder / MANIFEST_NAME} says {name}={said.get(name)!r}, but {CONFIG_NAME} means "
                f"{value!r}; one of them was changed by hand."
            )
    if weights.preprocess.image_size != config.vision.image_size:
        raise InputError(
            f"{folder / MANIFEST_NAME} says image_size={weights.preprocess.image_size}; the model "
            f"has {config.vision.image_size}."
        )
    if file in vocabulary.NAMES:
        tokenizer = replace(config.text.tokenizer, file=str(folder / file))
        config = replace(config, text=replace(config.text, tokenizer=tokenizer))
    return replace(weights, config=config)


_SINCE_2 = (  # in version 1 not there, or with other words
    *("version", "tokenizer", "vocab_size", "case_folding", "text_cleaning", "begin_id", "end_id"),
    *("padding_id", "padding_side", "cut"),
)
_PREPROCESS = {
    "image_size": "image_size",
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "interpolation",
    "resize_mode": "resize_mode",
    "fill": "fill",
    "rules": "pixel_rules",
}


def _from(said: dict[str, Any], folder: Path, kind: Any, names: dict[str, str]) -> Any:
    data = {field: said[name] for field, name in names.items() if name in said}
    return from_dict(kind, data, str(folder / MANIFEST_NAME))
