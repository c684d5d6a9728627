"""WebDataset tars with random access, by an index of each member's offset.

The index (tar_index.py) is built once, in parallel, and stored beside the shards or in a folder of
your choice; a shard that has changed is indexed again.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from jaxtyping import Float64, Int64

from clip_jax.data import reinforced
from clip_jax.data.class_folders import read_class_names
from clip_jax.data.sources import (
    SampleError,
    SourceConfig,
    StoredRecord,
    StoredSource,
    captions_of,
    scores,
)
from clip_jax.data.sources.shards import BadShards, listed
from clip_jax.data.sources.tar_index import TarIndex, open_index
from clip_jax.data.sources.tar_members import IMAGES, MORE, TEXTS, members, samples
from clip_jax.errors import InputError
from clip_jax.storage import files

Read = Callable[[int, int], bytes]  # offset and size


@dataclass(frozen=True, kw_only=True)
class TarConfig(SourceConfig):
    """WebDataset tars, in which members like 000.jpg and 000.txt (or .json, .cls) are a pair."""

    path: str  # Shards, such as data/{00000..00041}.tar, data/*.tar or gs://bucket/*.tar.
    caption: Literal["txt", "json", "cls"] = "txt"  # Extension of the member with the caption.
    caption_key: str = "caption"  # Key of the caption in a .json member.
    class_names: str = ""  # File with a class name in each line, for .cls; empty: the number.
    index: str = ""  # Folder for the index; empty: the folder of the first shard.
    bad_shards: BadShards = "error"  # Missing or damaged shards: stop with an error, or skip them.
    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".gz", ".tgz")  # gzip is rejected with a reason

    def open(self, _: int, process: tuple[int, int]) -> "TarSource":
        return TarSource(self, process)


class TarSource(StoredSource):
    """All pairs of all shards, in the order of the pattern. Raises InputError for unusable
    shards."""

    def __init__(self, config: TarConfig, process: tuple[int, int] = (0, 1)) -> None:
        """`process` is (index, count) of this process: all share the building of the index."""
        self._caption, self._caption_key = config.caption, config.caption_key
        file = config.class_names
        self._classes = read_class_names(files.as_path(file)) if file else []
        index = open_index(config.path, config.index, config.bad_shards, process)
        assert index is not None  # None only without waiting for the others
        self._index: TarIndex = index
        if not len(self):
            raise InputError(
                f"no samples in {listed(index.paths)}: tars need images "
                f"({', '.join(IMAGES)}) and texts ({', '.join(TEXTS)})"
            )

    def __len__(self) -> int:
        return len(self._index.places)

    def _find(self, index: int) -> tuple[str, pa.RecordBatch, int]:
        shard, row = self._index.places.find(index)
        try:
            return self._index.paths[shard], self._index.rows(shard), row
        except (OSError, pa.ArrowInvalid) as error:
            raise SampleError(f"index of the shard: {error}") from error

    def key(self, index: int) -> str:
        """Return the shard and the members' common name."""
        shard, rows, row = self._find(index)
        return f"{shard}:{rows['key'][row].as_py().decode(errors='replace')}"

    def record(self, index: int) -> StoredRecord:
        """Read the members with the image and the caption."""
        return self._read_rows(index, index + 1)[0]

    def blocks(self) -> Int64[np.ndarray, " blocks"]:
        """Return the number of samples in each block, which is about 4 MiB of a shard."""
        return self._index.counts

    def size(self, first: int, last: int) -> int:
        """Estimate the bytes of these samples, headers included."""
        return self._index.size(first, last)

    def fetch(self, first: int, last: int) -> list[StoredRecord]:
        """Read samples of one block in one request. A complete block is split by its headers; for a
        part of one, the index has the members' offsets."""
        shard, begin, end, *block = self._index.block(first)
        if [first, last] != block:
            return self._read_rows(first, last)
        return self._split(self._index.paths[shard], begin, end, last - first)

    def _split(self, path: str, begin: int, end: int, count: int) -> list[StoredRecord]:
        read = _reader(path, begin, end)
        try:
            inside = list(samples(members(read, begin, end, end + 1, end - begin)))
        except InputError as error:
            raise SampleError(f"shard changed: {error}") from error
        if len(inside) != count:
            raise SampleError(f"shard changed: other members at byte {begin}")
        return [self._record(path, sample.key, sample.spans, read) for sample in inside]

    def _read_rows(self, first: int, last: int) -> list[StoredRecord]:
        path, rows, row = self._find(first)
        columns = rows.slice(row, last - first).to_pydict()
        if "start" in columns:  # reinforced
            return self._split(path, columns["start"][0], columns["end"][-1], last - first)
        spans = [
            {
                name: (columns[f"{name}_offset"][i], columns[f"{name}_size"][i])
                for name in ("image", self._caption)
                if columns[f"{name}_offset"][i] is not None
            }
            for i in range(last - first)
        ]
        edges = [(at, at + size) for of_row in spans for at, size in of_row.values()]
        begin = min((at for at, _ in edges), default=0)
        read = _reader(path, begin, max((at for _, at in edges), default=0))
        rows_read = zip(columns["key"], spans, strict=True)
        return [self._record(path, key, of_row, read) for key, of_row in rows_read]

    def _record(
        self, path: str, key: bytes, spans: dict[str, tuple[int, int]], read: Read
    ) -> StoredRecord:
        wanted = ("image", self._caption, *MORE)
        content = {name: read(*spans[name]) for name in wanted if name in spans}

        def member(name: str) -> bytes:
            if name not in content:
                endings = "/.".join(IMAGES) if name == "image" else name
                raise SampleError(f"no .{endings} member")
            return content[name]

        def text() -> Any:
            return self._value(member(self._caption))

        return StoredRecord(
            f"{path}:{key.decode(errors='replace')}",
            sum(map(len, content.values())),
            lambda: member("image"),
            text,
            lambda: reinforced.from_members(content, len(captions_of(text()))),
        )

    def scores(self, column: str) -> Float64[np.ndarray, " N"]:
        """Return a column of img2dataset's Parquet files beside the shards, by members' keys."""
        columns = []
        for number, shard in enumerate(self._index.paths):
            rows = self._index.rows(number)
            paths = (key.decode(errors="replace") for key in rows["key"].to_pylist())
            keys = [path.rpartition("/")[2] for path in paths]
            columns.append(scores.beside_tar(shard, keys, column))
        return np.concatenate(columns)

    def _value(self, member: bytes) -> Any:
        """Return the argument of `caption_of`."""
        if self._caption == "txt":
            return member
        if self._caption == "json":
            try:
                fields = json.loads(member)
            except (ValueError, RecursionError) as error:
                raise SampleError(f".json is not JSON in UTF-8: {error}") from error
            if not isinstance(fields, dict):
                raise SampleError(f".json is a {type(fields).__name__}, not an object")
            return fields.get(self._caption_key)
        label = captions_of(member)[0].strip()
        if not self._classes:
            return label
        if not (label.isascii() and label.isdigit() and int(label) < len(self._classes)):
            raise SampleError(f".cls is {label!r:.40}, not a number below {len(self._classes)}")
        return self._classes[int(label)]


def _reader(path: str, begin: int, end: int) -> Read:
    """Read these bytes of a shard; return a function from offset and size to a part of them."""
    try:
        (data,) = files.read_ranges(path, [(begin, end - begin)])
    except OSError as error:
        raise SampleError(f"shard: {error.strerror or error}") from error
    if len(data) != end - begin:
        raise SampleError("shard ended before the member did: it changed during the run")
    view = memoryview(data)
    return lambda at, size: bytes(view[at - begin : at - begin + size])
