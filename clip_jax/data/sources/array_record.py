"""ArrayRecord shards, as `clip-jax prepare` writes them.

A record is a tf.train.Example with the features `image` (encoded), `caption` (one or several texts)
and `key`, so that other programs can read it too; reinforced.py has more of them. Each record is a
group of its own, so a random one costs one read. On a disk the library array_record reads them; it
does not open URLs.
"""

import functools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int64

from clip_jax.data import reinforced
from clip_jax.data.sources import SampleError, SourceConfig, StoredRecord, StoredSource
from clip_jax.data.sources.array_record_file import ArrayRecordFile
from clip_jax.data.sources.shards import BadShards, Places, settle
from clip_jax.errors import InputError
from clip_jax.storage import files

_THREADS = 64  # for reading the ends of the files
_BLOCK_BYTES = 1 << 22  # approximate bytes: transfer takes 30 ms, about as long as the latency


@dataclass(frozen=True, kw_only=True)
class ArrayRecordConfig(SourceConfig):
    """ArrayRecord shards of tf.train.Examples."""

    path: str  # Shards, such as data/*.array_record or data/{00000..00041}.array_record.
    image_column: str = "image"  # Feature with the encoded image.
    caption_column: str = "caption"  # Feature with one or several captions.
    bad_shards: BadShards = "error"  # Missing or damaged shards: stop with an error, or skip them.
    suffixes: ClassVar[tuple[str, ...]] = (".array_record",)

    def open(self, *_: Any) -> "ArrayRecordSource":
        return ArrayRecordSource(self)


class ArrayRecordSource(StoredSource):
    """One pair for each record, in the order of shards and records. Raises InputError for unusable
    shards."""

    def __init__(self, config: ArrayRecordConfig) -> None:
        paths = files.expand(config.path)
        with ThreadPoolExecutor(_THREADS) as threads:
            opened = list(threads.map(_open, paths))
        bad = [shard for shard in opened if isinstance(shard, str)]
        settle(config.path, bad, "not complete ArrayRecord files", config.bad_shards)
        self._shards = [shard for shard in opened if not isinstance(shard, str)]
        self._places = Places(len(shard) for shard in self._shards)
        if not len(self):
            raise InputError(f"{config.path} has no records; it needs at least one pair")
        self._config = config

    def __len__(self) -> int:
        return len(self._places)

    def blocks(self) -> Int64[np.ndarray, " blocks"]:
        """Return the number of records in each block: groups of about 4 MiB together."""
        counts = [np.zeros(0, np.int64)]
        for shard in filter(len, self._shards):
            groups = round(_BLOCK_BYTES / (shard.end / len(shard) * shard.group))
            each = max(1, groups) * shard.group
            counts.append(np.diff(np.append(np.arange(0, len(shard), each), len(shard))))
        return np.concatenate(counts)

    @functools.cached_property
    def _bytes(self) -> tuple[Int64[np.ndarray, " edges"], Int64[np.ndarray, " edges"]]:
        """Return the records and bytes before each shard, and in total."""
        shards = list(filter(len, self._shards))
        records = [len(shard) for shard in shards]
        sizes = [shard.end for shard in shards]
        return np.cumsum([0, *records]), np.cumsum([0, *sizes])

    def size(self, first: int, last: int) -> int:
        """Estimate the bytes of these records by the mean of their shard."""
        return int(np.diff(np.interp([first, last], *self._bytes))[0])

    def fetch(self, first: int, last: int) -> list[StoredRecord]:
        """Read records of one shard in one request."""
        records = self._read(first, last)
        return [self._record(self.key(i), x) for i, x in enumerate(records, first)]

    def key(self, index: int) -> str:
        """Return the shard and the number of the record."""
        shard, row = self._places.find(index)
        return f"{self._shards[shard].path}:{row}"

    def record(self, index: int) -> StoredRecord:
        """Read one record."""
        return self.fetch(index, index + 1)[0]

    def _record(self, key: str, record: bytes) -> StoredRecord:
        features = functools.cache(lambda: self._features(record))
        texts = self._config.caption_column
        return StoredRecord(
            key,
            len(record),
            lambda: self._image(features()),
            lambda: features().get(texts),
            lambda: reinforced.from_features(features(), len(features().get(texts, ()))),
        )

    def _features(self, record: bytes) -> dict[str, Any]:
        return decode_example(record)

    def _read(self, first: int, last: int) -> Sequence[bytes]:
        shard, row = self._places.find(first)
        try:
            return self._shards[shard].read(row, row + last - first)
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError, IndexError) as error:
            raise SampleError(f"record cannot be read: {error}") from error

    def _image(self, features: dict[str, Any]) -> bytes:
        image = features.get(self._config.image_column)
        if not image:
            raise SampleError(f"image is missing: no feature {self._config.image_column!r}")
        return image[0]


class _OnDisk(ArrayRecordFile):
    """Read by the library array_record, which also checks hashes and reads all kinds of chunks."""

    def __init__(self, path: str) -> None:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        super().__init__(path)
        self._records: Any = ArrayRecordDataSource(path)

    def read(self, first: int, last: int) -> Sequence[bytes]:
        if last == first + 1:
            return [self._records[first]]
        return self._records.__getitems__(range(first, last))


def _open(path: str) -> ArrayRecordFile | str:
    """Open a shard, or return its name and what is wrong with it."""
    try:
        if not files.is_remote(path):
            return _OnDisk(path)
        shard = ArrayRecordFile(path)
    except FileNotFoundError:
        return f"{path} (missing)"
    except InputError:
        raise
    except (OSError, ValueError, IndexError) as error:
        return f"{path} ({error})"
    if shard.transposed:
        return f"{path} (transposed, which is read from a disk only: clip-jax prepare it there)"
    return shard


# -------------------------------------------------------------------------------- tf.train.Example


@functools.cache
def _example() -> Any:
    """Build the message class, for bytes only; field numbers as in TensorFlow's example.proto."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(
        name="clip_jax_example.proto", package="clip_jax", syntax="proto3"
    )

    def message(name: str, field: str, label: int, of: int, type_name: str | None = None) -> Any:
        added = file.message_type.add(name=name)
        added.field.add(name=field, number=1, label=label, type=of, type_name=type_name)
        return added

    message("BytesList", "value", kind.LABEL_REPEATED, kind.TYPE_BYTES)
    optional = kind.LABEL_OPTIONAL
    repeated = kind.LABEL_REPEATED
    message("Feature", "bytes_list", optional, kind.TYPE_MESSAGE, ".clip_jax.BytesList")
    entries = ".clip_jax.Features.Entry"
    features = message("Features", "feature", repeated, kind.TYPE_MESSAGE, entries)
    entry = features.nested_type.add(name="Entry")
    entry.field.add(name="key", number=1, label=optional, type=kind.TYPE_STRING)
    entry.field.add(
        name="value",
        number=2,
        label=optional,
        type=kind.TYPE_MESSAGE,
        type_name=".clip_jax.Feature",
    )
    message("Example", "features", optional, kind.TYPE_MESSAGE, ".clip_jax.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("clip_jax.Example"))


def encode_example(features: dict[str, list[bytes]]) -> bytes:
    """Serialise features as a tf.train.Example; equal features give equal bytes."""
    example = _example()()
    for name in sorted(features):
        entry = example.features.feature.add(key=name)
        entry.value.bytes_list.value.extend(features[name])
    return example.SerializeToString(deterministic=True)


def decode_example(record: bytes) -> dict[str, list[bytes]]:
    """Return the bytes features by name. Raises SampleError if it is no tf.train.Example."""
    from google.protobuf.message import DecodeError

    try:
        example = _example().FromString(record)
    except DecodeError as error:
        raise SampleError(f"record is no tf.train.Example: {error}") from error
    return {e.key: list(e.value.bytes_list.value) for e in example.features.feature}
