"""One way in and one way out for every format."""

from pathlib import Path
from typing import Literal

from clip_jax.convert import folder, hugging_face, open_clip, openai
from clip_jax.convert.files import read_json, read_tensors
from clip_jax.convert.weights import DType, Weights, same_sizes
from clip_jax.models.layers import Activation

Format = Literal["openai", "open-clip", "hugging-face", "clip-jax"]
# By which a folder is told to be of a format; beside those of another one they would mislead.
_MARKS = {
    "open-clip": {open_clip.CONFIG_NAME, open_clip.WEIGHTS_NAME},
    "hugging-face": {"config.json", hugging_face.WEIGHTS_NAME},
    "clip-jax": {folder.MANIFEST_NAME, folder.CONFIG_NAME, folder.WEIGHTS_NAME},
}


def read_weights(
    path: Path, *, activation: Activation | None = None, architecture: str | None = None
) -> Weights:
    """Read a model file or folder of any format that we know; the content tells which.

    `activation` and `architecture` answer what a bare file of tensors cannot say; where the format
    says it itself, a contradiction raises ValueError.
    """
    weights = _read(path, activation, architecture)
    check_said(weights, path, activation, architecture)
    return weights


def check_said(
    weights: Weights, path: Path, activation: Activation | None, architecture: str | None
) -> None:
    """ValueError if what was told of a model is not what its format says."""
    said = weights.config.text.activation
    if activation not in (None, said):
        raise ValueError(
            f"{path} says that its activation is {said}, not {activation}; leave out --activation."
        )
    if architecture is not None:
        same_sizes(weights.config, architecture, str(path))


def _read(path: Path, activation: Activation | None, architecture: str | None) -> Weights:
    if not path.exists():
        raise ValueError(
            f"there is no {path}: a model is a file (.pt, .bin, .safetensors) or a folder."
        )
    config_path = (path if path.is_dir() else path.parent) / open_clip.CONFIG_NAME
    if path.is_dir():
        if folder.is_folder(path):
            return folder.read(path)
        if _is_hugging_face(path):
            return hugging_face.read(path)
        path = open_clip.find_weights(path)
    tensors = read_tensors(path)
    if any(name.startswith("text_model.") for name in tensors):
        return hugging_face.read(path.parent)
    return open_clip.read(
        tensors,
        str(path),
        config_path if config_path.exists() else None,
        activation=activation,
        architecture=architecture,
    )


def _is_hugging_face(path: Path) -> bool:
    """Say whether a folder is Hugging Face's. Some hold open_clip's files too; those are taken."""
    config = path / "config.json"
    open_clips = (path / open_clip.CONFIG_NAME).exists() and any(
        (path / name).exists() for name in open_clip.WEIGHTS_NAMES if name.startswith("open_clip")
    )
    return config.exists() and not open_clips and "model_type" in read_json(config)


def write_weights(
    weights: Weights, path: Path, to: Format, *, plain: bool = False, dtype: DType | None = None
) -> None:
    """Write a model in one of the formats. ValueError if the format cannot express it.

    In a folder that held another format's files, those by which it was known are removed.
    """
    if plain and to != "openai":
        raise ValueError(f"--plain is a choice of --to openai; --to {to} has no such form.")
    match to:
        case "openai":
            openai.write(weights, path, plain=plain, dtype=dtype)
        case "open-clip":
            open_clip.write(weights, path, dtype=dtype)
        case "hugging-face":
            hugging_face.write(weights, path, dtype=dtype)
        case "clip-jax":
            folder.write(weights, path, dtype=dtype)
    if to in _MARKS:
        for name in set().union(*_MARKS.values()) - _MARKS[to]:
            (path / name).unlink(missing_ok=True)
