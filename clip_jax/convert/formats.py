"""One way in and one way out for every format."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from clip_jax.checkpoints.retention import split_name
from clip_jax.convert import (
    big_vision,
    hugging_face,
    model_folder,
    open_clip,
    open_clip_config,
    openai,
    run,
    tokenizer_files,
)
from clip_jax.convert.settings import read_json
from clip_jax.convert.state_dict import flatten
from clip_jax.convert.target import Target
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.verify import Verification, our_outputs, random_inputs, relative_difference
from clip_jax.convert.weights import DType, Weights, resize_positions, with_vocabulary
from clip_jax.data.tokenizers import make_tokenizer, vocabulary
from clip_jax.errors import InputError
from clip_jax.models.layers import Activation
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

Format = Literal["openai", "open-clip", "hugging-face", "big-vision", "clip-jax"]
TARGETS: dict[Format, Target] = {
    "openai": openai.TARGET,
    "open-clip": open_clip.TARGET,
    "hugging-face": hugging_face.TARGET,
    "big-vision": big_vision.TARGET,
    "clip-jax": model_folder.TARGET,
}
# By which a folder is known to be of a format, and its inputs; left by another they would mislead.
_KNOWN = {
    *(name for target in TARGETS.values() for name in target.names),
    *(tokenizer_files.CONFIG_NAME, tokenizer_files.SIGLIP_NAME, *vocabulary.NAMES),
}


def read_weights(
    path: AnyPath,
    *,
    activation: Activation | None = None,
    image_size: int | None = None,
    tokenizer: str | None = None,
) -> Weights:
    """Read a run, or a model file or folder of any format that we know; the content tells which.

    RUN@20000 is its checkpoint of that step, RUN@best its best; RUN alone its newest.

    `activation` answers what a bare file of tensors cannot say; where the format says it itself, a
    contradiction raises InputError. `image_size` other than the model's resizes its positions.
    `tokenizer` is the vocabulary of weights that came without theirs.
    """
    path, which = split_name(path)
    if not path.exists():
        raise InputError(
            f"there is no {path}: a model is a file (.pt, .bin, .safetensors, .npz) or a folder."
        )
    if run.is_run(path):
        weights = run.read(path, which)
    elif which:
        raise InputError(f"{path} is no run, which alone has a checkpoint @{which}.")
    else:
        with files.local(path) as here:
            weights = _relocated(path, here, _read(here, activation))
    _check_numbers(weights, path)
    own = weights.config.text.activation
    if activation not in (None, own):
        raise InputError(
            f"{path} says that its activation is {own}, not {activation}; leave out --activation."
        )
    if tokenizer is not None:
        if file := weights.config.text.tokenizer.file:
            raise InputError(f"{path} came with its tokenizer, {file}; leave out --tokenizer.")
        weights = replace(weights, config=with_vocabulary(weights.config, tokenizer))
        make_tokenizer(weights.config.text)  # or say what is wrong with it
    if image_size in (None, weights.config.vision.image_size):
        return weights
    return resize_positions(weights, image_size)


def _relocated(path: AnyPath, copy: Path, weights: Weights) -> Weights:
    """Name a vocabulary in a bucket by its URL, where it was read from a temporary `copy`."""
    file = weights.config.text.tokenizer.file
    if copy == path or not file.startswith(f"{copy}/"):
        return weights
    file = os.fspath(path / file.removeprefix(f"{copy}/"))
    return replace(weights, config=with_vocabulary(weights.config, file))


def _check_numbers(weights: Weights, path: AnyPath) -> None:
    """Raise InputError if a weight is no finite number: nothing that comes of it would be one
    either."""
    for name, array in flatten(weights.params).items():
        if array.dtype.kind in "biuc":
            raise InputError(
                f"{path}: {name} has the type {array.dtype}; weights are floating-point numbers."
            )
        if not np.isfinite(array).all():
            bad = int((~np.isfinite(array)).sum())
            raise InputError(
                f"{path}: {name} has {bad} values of {array.size} that are NaN or infinite, so "
                "every prediction would be; take an earlier checkpoint, or the file again."
            )


def _read(path: Path, activation: Activation | None) -> Weights:
    config_path = (path if path.is_dir() else path.parent) / open_clip_config.CONFIG_NAME
    if path.is_dir():
        if (path / model_folder.MANIFEST_NAME).is_file():
            return model_folder.read(path)
        if _is_hugging_face(path):
            return hugging_face.read(path)
        path = open_clip.find_weights(path)
    tensors = read_tensors(path)
    if any(name.startswith(("img/", "params/img/")) for name in tensors):
        return big_vision.read(tensors, str(path))
    if any(name.startswith("text_model.") for name in tensors):
        return hugging_face.read(path.parent)
    return open_clip.read(
        tensors,
        str(path),
        config_path if config_path.exists() else None,
        activation=activation,
    )


def _is_hugging_face(path: Path) -> bool:
    """Say whether a folder is Hugging Face's. Some hold open_clip's files too; those are taken."""
    config = path / "config.json"
    open_clips = (path / open_clip_config.CONFIG_NAME).exists() and any(
        (path / name).exists() for name in open_clip.WEIGHTS_NAMES if name.startswith("open_clip")
    )
    return config.exists() and not open_clips and "model_type" in read_json(config)


def write_weights(
    weights: Weights, path: AnyPath, to: Format, *, dtype: DType | None = None
) -> None:
    """Write a model in one of the formats. Raises InputError if the format cannot express it.

    In a folder that held another format's files, those by which it was known are removed.
    """
    target = TARGETS[to]
    with files.written_whole(path) as partial:
        target.write(weights, partial, dtype=dtype)
        written = {file.name for file in partial.iterdir()} if target.names else _KNOWN
    for name in _KNOWN - written:
        files.remove(path / name)


def verify(weights: Weights, path: Path, to: Format, *, dtype: DType | None = None) -> Verification:
    """Load what was written at `path` with the format's own library and compare.

    That library or `dtype` may round weights: then it is compared with our model on the rounded
    weights, and the loss by rounding is a number of its own. Raises InputError if the library is
    not installed, Unverifiable if it has no such model.
    """
    target = TARGETS[to]
    inputs = random_inputs(weights.config)
    params = target.rounded(weights, dtype)
    ours = our_outputs(weights.config, params, *inputs)
    theirs = target.outputs(weights, path, inputs)
    loss = None
    if params is not weights.params:
        exact = our_outputs(weights.config, weights.params, *inputs)
        loss = max(relative_difference(ours[name], exact[name]) for name in exact)
    differences = {name: relative_difference(ours[name], theirs[name]) for name in ours}
    return Verification(reference=target.reference, rounding_loss=loss, **differences)
