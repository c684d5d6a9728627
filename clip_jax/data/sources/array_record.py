"""ArrayRecord shards, as `clip-jax prepare` writes them.

A record is a tf.train.Example with the features `image` (encoded), `caption` (one or several texts)
and `key`, so that other programs read it too. Each record is a group of its own: a random one
costs one read.
"""

import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from clip_jax.data.sources import SampleError, caption_of, captions_of, files


@dataclass(frozen=True, kw_only=True)
class ArrayRecordConfig:
    """ArrayRecord shards of tf.train.Examples."""

    path: str  # data/*.array_record
    image_column: str = "image"  # feature with the encoded image
    caption_column: str = "caption"  # feature with one or several texts
    bad_shards: files.BadShards = "error"  # missing, truncated or damaged ones


class ArrayRecordSource:
    """One pair a record, in the order of shards and records. ValueError for shards not usable."""

    def __init__(self, config: ArrayRecordConfig) -> None:
        paths = files.expand(config.path)
        with ThreadPoolExecutor() as threads:
            opened = list(threads.map(_open, paths))
        bad = [shard for shard in opened if isinstance(shard, str)]
        files.settle(config.path, bad, "no ArrayRecord, or not whole", config.bad_shards)
        self._shards = [shard for shard in opened if not isinstance(shard, str)]
        self._ends = np.cumsum([len(shard) for shard in self._shards], dtype=np.int64)
        if not len(self):
            raise ValueError(f"{config.path} has no records; data.source.path needs at least one")
        self._config = config
        self._paths = [
            path for path, one in zip(paths, opened, strict=True) if not isinstance(one, str)
        ]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, index: int) -> tuple[int, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, index - (int(self._ends[shard - 1]) if shard else 0)

    def key(self, index: int) -> str:
        """Shard and number of the record."""
        shard, place = self._find(index)
        return f"{self._paths[shard]}:{place}"

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        """Get the encoded image and the caption."""
        features = self._features(index)
        return self._image(features), caption_of(features.get(self._config.caption_column), rng)

    def image(self, index: int) -> bytes:
        """Get the encoded image."""
        return self._image(self._features(index))

    def captions(self, index: int) -> list[str]:
        """Get all values of the caption's feature."""
        return captions_of(self._features(index).get(self._config.caption_column))

    def _features(self, index: int) -> dict[str, list[bytes]]:
        shard, place = self._find(index)
        try:
            return decode_example(self._shards[shard][place])
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise SampleError(f"record cannot be read: {error}") from error

    def _image(self, features: dict[str, list[bytes]]) -> bytes:
        image = features.get(self._config.image_column)
        if not image:
            raise SampleError(f"image is missing: no feature {self._config.image_column!r}")
        return image[0]


def _open(path: str) -> Any:
    """An open shard, or its name and what is wrong with it."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    try:
        files.stat(path)
        shard = ArrayRecordDataSource(path)
        len(shard)  # reads the end, where the index is
    except FileNotFoundError:
        return f"{path} (missing)"
    except (OSError, RuntimeError, ValueError, IndexError) as error:
        return f"{path} ({error})"
    return shard


# -------------------------------------------------------------------------------- tf.train.Example


@functools.cache
def _example() -> Any:
    """The message class, with bytes alone: field numbers from TensorFlow's example.proto."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="clip_jax_example.proto", package="clip_jax", syntax="proto3"
    )

    def message(name: str, field: str, label: int, of: int, type_name: str | None = None) -> Any:
        found = file.message_type.add(name=name)
        found.field.add(name=field, number=1, label=label, type=of, type_name=type_name)
        return found

    message("BytesList", "value", kind.LABEL_REPEATED, kind.TYPE_BYTES)
    one, many = kind.LABEL_OPTIONAL, kind.LABEL_REPEATED
    message("Feature", "bytes_list", one, kind.TYPE_MESSAGE, ".clip_jax.BytesList")
    features = message("Features", "feature", many, kind.TYPE_MESSAGE, ".clip_jax.Features.Entry")
    entry = features.nested_type.add(name="Entry")
    entry.field.add(name="key", number=1, label=one, type=kind.TYPE_STRING)
    entry.field.add(
        name="value", number=2, label=one, type=kind.TYPE_MESSAGE, type_name=".clip_jax.Feature"
    )
    message("Example", "features", one, kind.TYPE_MESSAGE, ".clip_jax.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("clip_jax.Example"))


def encode_example(features: dict[str, list[bytes]]) -> bytes:
    """Serialise, the same bytes for the same features."""
    example = _example()()
    for name in sorted(features):
        entry = example.features.feature.add(key=name)
        entry.value.bytes_list.value.extend(features[name])
    return example.SerializeToString(deterministic=True)


def decode_example(record: bytes) -> dict[str, list[bytes]]:
    """Bytes features by name. ValueError if it is no tf.train.Example."""
    from google.protobuf.message import DecodeError

    try:
        example = _example().FromString(record)
    except DecodeError as error:
        raise ValueError(f"not a tf.train.Example: {error}") from error
    return {e.key: list(e.value.bytes_list.value) for e in example.features.feature}
