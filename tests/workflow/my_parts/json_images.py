"""Data source: JSON lines that hold the images themselves, in base64."""

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any, ClassVar

from clip_jax.data.sources import (
    SampleError,
    SourceConfig,
    StoredRecord,
    StoredSource,
    read_file,
    text_of,
)
from clip_jax.errors import InputError
from clip_jax.storage import files


@dataclass(frozen=True, kw_only=True)
class JsonImagesConfig(SourceConfig):
    """JSON lines with base64-encoded images and their captions."""

    path: str  # A file whose lines are objects, local or in a bucket; it is read into memory.
    image_column: str = "image"  # Field of the images.
    caption_column: str = "caption"  # Field of the captions.
    suffixes: ClassVar[tuple[str, ...]] = (".b64",)

    def open(self, *_: Any) -> "JsonImagesSource":
        return JsonImagesSource(self)


class JsonImagesSource(StoredSource):
    """One pair for each line."""

    def __init__(self, config: JsonImagesConfig) -> None:
        self.config, path = config, files.as_path(config.path)
        try:
            self._lines = [line for line in read_file(path, "file").splitlines() if line.strip()]
        except SampleError as error:
            raise InputError(f"{config.path}: {error}; correct data.source.path") from error
        if not self._lines:
            raise InputError(f"{config.path} is empty; it needs at least one pair")

    def __len__(self) -> int:
        return len(self._lines)

    def key(self, index: int) -> str:
        """Return the number of the line among those that are not empty."""
        return str(index + 1)

    def record(self, index: int) -> StoredRecord:
        """Return a line's image and caption."""
        try:
            row = json.loads(self._lines[index])
            image, text = (
                row[name] for name in (self.config.image_column, self.config.caption_column)
            )
        except (ValueError, TypeError, KeyError) as error:
            raise SampleError(f"line is not an object with image and caption: {error}") from error
        return StoredRecord(
            self.key(index), len(self._lines[index]), lambda: _decoded(image), lambda: text
        )


def _decoded(value: Any) -> bytes:
    try:
        return base64.b64decode(text_of(value, "image"), validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError(f"image is not base64: {error}") from error
