"""clip_jax's model folder: safetensors under our parameter paths, configuration, manifest.

The manifest records in plain words the settings that are easily lost elsewhere; on reading, it must
agree with the configuration.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from clip_jax.convert.settings import read_json, write_json
from clip_jax.convert.state_dict import Convention, flatten, table, to_params
from clip_jax.convert.target import Target
from clip_jax.convert.tensor_files import read_tensors, write_safetensors
from clip_jax.convert.weights import DType, Weights, cast, default_preprocess, with_vocabulary
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers import vocabulary
from clip_jax.errors import InputError, naming
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.templates import check_template
from clip_jax.serialize import from_dict, to_dict
from clip_jax.storage.json_files import check_version

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
MANIFEST_NAME = "manifest.json"
FORMAT = "clip-jax"
VERSION = 2
# Fields of `Preprocess` → keys of the manifest.
_PREPROCESS = {
    "image_size": "image_size",
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "interpolation",
    "resize_mode": "resize_mode",
    "crop_ratio": "crop_ratio",
    "fill": "fill",
    "rules": "pixel_rules",
    "max_patches": "max_patches",
    "patch_size": "patch_size",
}


def manifest(weights: Weights) -> dict[str, Any]:
    """Return what a user of the weights needs to know, as plain JSON values."""
    config, vision, text = weights.config, weights.config.vision, weights.config.text
    tokenizer = text.tokenizer
    is_clip = tokenizer.file == "clip"
    values = to_dict(weights.preprocess)
    newer: dict[str, Any] = {"fill": 0, "rules": "openai", "crop_ratio": 1.0}
    newer |= {"max_patches": None, "patch_size": None}
    # At their defaults, entries that older folders lack are left out.
    pixels = {key: values[f] for f, key in _PREPROCESS.items() if values[f] != newer.get(f)}
    stretch: dict[str, Any] = {}
    if text.stretched_from is not None:
        stretch["text_positions_stretched_from"] = text.stretched_from
        stretch["text_positions_kept"] = text.kept_positions
    return {
        "format": FORMAT,
        "version": VERSION,
        "image_activation": vision.activation,
        "text_activation": text.activation,
        "image_pooling": vision.pool,
        "text_pooling": text.pool,
        "tokenizer": tokenizer.file.rpartition("/")[2] or "missing",
        "vocab_size": text.clip_vocab_size if is_clip else text.vocab_size,
        "context_length": text.context_length,
        "case_folding": tokenizer.clean not in ("none", "whitespace"),
        "text_cleaning": tokenizer.clean,
        "begin_id": text.begin_id,
        "end_id": text.end_id,
        "padding_id": tokenizer.pad_id,
        "padding_side": tokenizer.pad_side,
        "cut": tokenizer.cut,
        **stretch,
        **pixels,
        "embed_dim": config.embed_dim,
    }


def write(weights: Weights, folder: Path, *, dtype: DType | None = None) -> None:
    """Write the folder; with `dtype` None arrays keep theirs."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {path: cast(x, dtype) for path, x in flatten(weights.params).items()}
    write_safetensors(folder / WEIGHTS_NAME, tensors, {"format": FORMAT})
    file = vocabulary.keep(weights.config.text.tokenizer, str(folder))
    config = with_vocabulary(weights.config, file)
    write_json(folder / CONFIG_NAME, to_dict(config))
    content = manifest(replace(weights, config=config))
    if weights.template is not None:
        content["template"] = weights.template
    write_json(folder / MANIFEST_NAME, content)


def read(folder: Path) -> Weights:
    """Read the folder. Raises InputError if manifest and configuration disagree."""
    path = folder / MANIFEST_NAME
    content = read_json(path)
    version = content.get("version")
    if content.get("format") == FORMAT:
        check_version(content, VERSION, path)
    if content.get("format") != FORMAT or version != VERSION:
        raise InputError(
            f"{path} has format {content.get('format')!r}, version {version!r}; {FORMAT!r}, "
            f"version {VERSION} is supported."
        )
    config_path = folder / CONFIG_NAME
    with naming(config_path):
        config = from_dict(CLIPConfig, read_json(config_path), str(config_path))
    file = config.text.tokenizer.file
    if file not in ("", "clip", *vocabulary.NAMES):
        raise InputError(
            f"{config_path}: text.tokenizer.file={file!r:.99} must be one of "
            f"{', '.join(vocabulary.NAMES)} in the folder."
        )
    tensors = read_tensors(folder / WEIGHTS_NAME)
    template = content.get("template")
    if template is not None:
        if not isinstance(template, str):
            raise InputError(f"{path} says template={template!r:.200}; it must be a string.")
        check_template(template, f"{path}: template")
    preprocess = {field: content[name] for field, name in _PREPROCESS.items() if name in content}
    weights = Weights(
        config=config,
        params=to_params(table(config, Convention()), tensors, config, str(folder / WEIGHTS_NAME)),
        preprocess=from_dict(Preprocess, preprocess, str(path)),
        template=template,
    )
    for name, value in manifest(weights).items():
        if content.get(name) != value:
            raise InputError(
                f"{path} says {name}={content.get(name)!r}, but {CONFIG_NAME} implies {value!r}; "
                "undo the change by hand of one of them."
            )
    needed = default_preprocess(config)
    for name in ("image_size", "max_patches", "patch_size"):
        value, other = (getattr(x, name) for x in (weights.preprocess, needed))
        if value != other:
            raise InputError(
                f"{path} says {name}={value}, but the model has {other}; undo the change by hand "
                "of one of them."
            )
    if file in vocabulary.NAMES:
        config = with_vocabulary(config, str(folder / file))
    return replace(weights, config=config)


TARGET = Target(
    write=write,
    load=None,
    check=manifest,
    names=(MANIFEST_NAME, CONFIG_NAME, WEIGHTS_NAME),
    use="`clip_jax.load(FOLDER)`; `manifest.json` describes preprocessing and tokenization.",
    use_naflex=" Images keep their aspect ratio (NaFlex); `tokens=N` sets the patches per image.",
)
