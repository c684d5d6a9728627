"""Vocabulary files: read from a disk or a bucket, recognised by content, saved with a model."""

import dataclasses
import hashlib
import os

from clip_jax.errors import InputError
from clip_jax.models.text import TokenizerConfig
from clip_jax.storage import files

JSON_NAME = "tokenizer.json"
SENTENCEPIECE_NAME = "tokenizer.model"
NAMES = (JSON_NAME, SENTENCEPIECE_NAME)
_LARGEST = 256 << 20  # bytes; a vocabulary of 901,629 words takes about 50 million


def read_vocabulary(file: str) -> bytes:
    """Read a vocabulary file. Raises InputError if it cannot be read or is too large."""
    try:
        if not files.is_remote(file) and os.path.exists(file) and not os.path.isfile(file):
            raise OSError("a folder, a pipe or a device")
        size, _ = files.stat(file)
        if size > _LARGEST:
            raise InputError(
                f"{file} has {size} bytes, more than any vocabulary; correct text.tokenizer.file."
            )
        return files.read(file)
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror or error}). Set text.tokenizer.file to a "
            "tokenizer.json or a sentencepiece model."
        ) from error


def is_json(data: bytes) -> bool:
    """Return whether a vocabulary is a `tokenizer.json`."""
    return data[:64].lstrip()[:1] == b"{"


def keep(config: TokenizerConfig, folder: str) -> str:
    """Copy a vocabulary file into a folder and return its name there.

    CLIP's, which is bundled, is not copied. Raises InputError if the folder has another vocabulary.
    """
    if config.file in ("", "clip"):
        return config.file
    data = read_vocabulary(config.file)
    name = JSON_NAME if is_json(data) else SENTENCEPIECE_NAME
    path = f"{folder.rstrip('/')}/{name}"
    try:
        before = read_vocabulary(path)
    except InputError:
        files.write_whole(path, data)
        return name
    if before != data:
        raise InputError(f"{path} and {config.file} differ; use another folder.")
    return name


def digest(config: TokenizerConfig) -> str:
    """Return a short id of a vocabulary, by which processes check that they use the same."""
    if config.file in ("", "clip"):
        return config.file
    return hashlib.sha256(read_vocabulary(config.file)).hexdigest()[:16]


def check_same(ours: TokenizerConfig, theirs: TokenizerConfig, source: str) -> None:
    """Raise InputError, naming the difference, if weights were trained with other ids than `ours`.

    Weights without a vocabulary cannot be checked.
    """
    for field in dataclasses.fields(ours):
        values = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name == "file" and not {"clip", ""} & set(values):
            values = read_vocabulary(ours.file), read_vocabulary(theirs.file)
        if theirs.file and values[0] != values[1]:
            raise InputError(
                f"{source} was trained with other token ids: its text.tokenizer.{field.name} is "
                f"{getattr(theirs, field.name)!r}, this model's {getattr(ours, field.name)!r}. "
                "Use the same tokenizer; a run may also begin with the image tower alone "
                "(--init-towers image)."
            )
