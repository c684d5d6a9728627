"""The file of a vocabulary: read from disk or bucket, told by its content, kept with a model."""

import dataclasses
import hashlib
import os

from clip_jax.errors import InputError
from clip_jax.models.text import TokenizerConfig
from clip_jax.storage import files

JSON_NAME = "tokenizer.json"
SENTENCEPIECE_NAME = "tokenizer.model"
NAMES = (JSON_NAME, SENTENCEPIECE_NAME)
_LARGEST = 256 << 20  # bytes; 901,629 words take about 50 million


def read_vocabulary(file: str) -> bytes:
    """Read a vocabulary's file whole. Raises InputError if there is none, or it is longer than
    any."""
    try:
        if not files.is_remote(file) and os.path.exists(file) and not os.path.isfile(file):
            raise OSError("a folder, a pipe or a device")
        size, _ = files.stat(file)
        if size > _LARGEST:
            raise InputError(f"{file} has {size} bytes; no vocabulary is that long.")
        return files.read(file)
    except OSError as error:
        raise InputError(
            f"{file} cannot be read ({error.strerror or error}): text.tokenizer.file is a "
            "tokenizer.json or a sentencepiece model."
        ) from error


def is_json(data: bytes) -> bool:
    """Say whether a vocabulary is a `tokenizer.json`."""
    return data[:64].lstrip()[:1] == b"{"


def keep(config: TokenizerConfig, folder: str) -> str:
    """Copy a vocabulary's file into a folder; return the name it has there.

    CLIP's, which is bundled, needs no copy. Raises InputError if another vocabulary is kept there
    already.
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
        raise InputError(f"{path} is another vocabulary than {config.file}.")
    return name


def digest(config: TokenizerConfig) -> str:
    """Say in few letters which vocabulary it is, so that processes can agree on one."""
    if config.file in ("", "clip"):
        return config.file
    return hashlib.sha256(read_vocabulary(config.file)).hexdigest()[:16]


def check_same(ours: TokenizerConfig, theirs: TokenizerConfig, source: str) -> None:
    """Raise InputError, which names the difference, if weights were trained with other ids than
    `ours`.

    Weights that came without their vocabulary cannot say.
    """
    for field in dataclasses.fields(ours):
        values = getattr(ours, field.name), getattr(theirs, field.name)
        if field.name == "file" and not {"clip", ""} & set(values):
            values = read_vocabulary(ours.file), read_vocabulary(theirs.file)
        if theirs.file and values[0] != values[1]:
            raise InputError(
                f"{source} has the words of other ids: its text.tokenizer.{field.name} is "
                f"{getattr(theirs, field.name)!r}, this model's {getattr(ours, field.name)!r}. "
                "Give it the same tokenizer, or take the image tower alone with --init-towers."
            )
