"""TensorFlow Datasets, prepared as array_record or Parquet, read without TensorFlow."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_jax.data.sources import (
    SampleError,
    SourceConfig,
    StoredRecord,
    StoredSource,
    check_columns,
)
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource
from clip_jax.errors import InputError
from clip_jax.storage import files


@dataclass(frozen=True, kw_only=True)
class TfdsConfig(SourceConfig):
    """A data set prepared by TFDS with `file_format="array_record"` or "parquet"."""

    path: str  # Folder of the version, with dataset_info.json: .../name/1.0.0.
    split: str = "train"  # Name of the split.
    image_column: str = "image"  # Feature with the image.
    caption_column: str = "caption"  # Feature with a text or a sequence of texts.

    def open(self, *_: Any) -> StoredSource:
        return (TfdsBucketSource if files.is_remote(self.path) else TfdsSource)(self)


def _builder(config: TfdsConfig) -> Any:
    """Open a version's folder. Raises InputError if it is none, or lacks the split or a column."""
    import tensorflow_datasets as tfds

    folder = files.as_path(config.path)
    if not (folder / "dataset_info.json").is_file():
        raise InputError(
            f"no dataset_info.json in {folder}; give the version's folder of a prepared TFDS "
            "data set, such as .../coco_captions/1.1.0"
        )
    builder: Any = tfds.builder_from_directory(str(folder))
    check_columns(folder, config, list(builder.info.features))
    if config.split not in builder.info.splits:
        raise InputError(
            f"{folder} has no split {config.split!r}, only "
            f"{', '.join(map(repr, builder.info.splits))}; set split"
        )
    return builder


class TfdsSource(StoredSource):
    """One pair for each example, images as stored. Raises InputError for unusable folders."""

    def __init__(self, config: TfdsConfig) -> None:
        self._examples = _builder(config).as_data_source(
            split=config.split, decoders=_as_stored(config)
        )
        self._config = config

    def __len__(self) -> int:
        return len(self._examples)

    def key(self, index: int) -> str:
        """Return the split and the number of the example."""
        return f"{self._config.split}:{index}"

    def record(self, index: int) -> StoredRecord:
        """Read one example."""
        try:
            example = self._examples[index]
        except (OSError, ValueError, RuntimeError) as error:
            raise SampleError(f"example cannot be read: {error}") from error
        config = self._config
        return StoredRecord(
            self.key(index),
            0,
            lambda: _bytes(example[config.image_column]),
            lambda: _texts(example[config.caption_column]),
        )


class TfdsBucketSource(ArrayRecordSource):
    """The examples of a TFDS folder in a bucket, where TFDS itself cannot read them."""

    def __init__(self, config: TfdsConfig) -> None:
        info = _builder(config).info
        if info.file_format.value != "array_record":
            raise InputError(
                f"{config.path} is stored as {info.file_format.value}; in a bucket only "
                'array_record can be read: build it with file_format="array_record", or read it '
                "from a disk"
            )
        super().__init__(
            ArrayRecordConfig(
                path=f"{files.escape(config.path.rstrip('/'))}/*-{config.split}.array_record*",
                image_column=config.image_column,
                caption_column=config.caption_column,
            )
        )
        self._example = functools.partial(
            info.features.deserialize_example_np, decoders=_as_stored(config)
        )

    def _features(self, record: bytes) -> dict[str, Any]:
        try:
            example = self._example(record)
        except (ValueError, RuntimeError, KeyError) as error:
            raise SampleError(f"example cannot be read: {error}") from error
        image, caption = self._config.image_column, self._config.caption_column
        return {image: [_bytes(example[image])], caption: _texts(example[caption])}


def _as_stored(config: TfdsConfig) -> dict[str, Any]:
    """Tell TFDS to leave images encoded."""
    import tensorflow_datasets as tfds

    return {config.image_column: tfds.decode.SkipDecoding()}


def _bytes(image: Any) -> bytes:
    image = image.item() if isinstance(image, np.ndarray) and image.ndim == 0 else image
    if not isinstance(image, bytes):
        raise SampleError(f"image is {type(image).__name__}, not encoded bytes")
    return image


def _texts(caption: Any) -> Any:
    if isinstance(caption, dict):  # a sequence of {"text": ...}, as in coco_captions
        caption = next(iter(caption.values()), [])
    return caption.tolist() if isinstance(caption, np.ndarray) else caption
