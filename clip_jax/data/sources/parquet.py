"""Parquet files that contain the images, in Hugging Face's or img2dataset's layout.

Parquet has no random access: reading a row costs its row group. With row groups of 100 rows, as
Hugging Face writes image data sets, that is bearable; for speed, convert with `clip-jax prepare`.
"""

import errno
import functools
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float64, Int64

from clip_jax.data.sources import (
    SampleError,
    SourceConfig,
    StoredRecord,
    StoredSource,
    check_columns,
    scores,
)
from clip_jax.data.sources.shards import BadShards, Places, settle
from clip_jax.errors import InputError
from clip_jax.storage import files

_THREADS = 16  # for reading the footers of the files
_OPEN_GROUPS = 8  # row groups cached in memory; each thread needs one at a time


@dataclass(frozen=True, kw_only=True)
class ParquetConfig(SourceConfig):
    """Pairs in Parquet files. In those of img2dataset the image column is `jpg`."""

    path: str  # Files: data/*.parquet or data/{00000..00041}.parquet.
    image_column: str = "image"  # Column of encoded images, or structs with `bytes` (HF).
    caption_column: str = "caption"  # Column of captions, or lists of which one is drawn.
    bad_shards: BadShards = "error"  # Missing or damaged shards: stop with an error, or skip them.
    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def open(self, *_: Any) -> "ParquetSource":
        return ParquetSource(self)


class ParquetSource(StoredSource):
    """One pair for each row, in the order of files. Raises InputError for unusable files."""

    def __init__(self, config: ParquetConfig) -> None:
        paths = files.expand(config.path)
        with ThreadPoolExecutor(_THREADS) as threads:
            read = list(threads.map(_metadata, paths))
        bad = []
        good = []
        for path, metadata in zip(paths, read, strict=True):
            if isinstance(metadata, str):
                bad.append(metadata)
            else:
                good.append((path, metadata))
        settle(config.path, bad, "unusable", config.bad_shards)
        self._paths = [path for path, _ in good]
        self._metadata = [metadata for _, metadata in good]
        self._columns = [config.image_column, config.caption_column]
        groups, sizes = [], []
        for number, (path, metadata) in enumerate(good):
            check_columns(path, config, metadata.schema.to_arrow_schema().names)
            groups += [(number, group) for group in range(metadata.num_row_groups)]
            sizes += [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
        self._groups = groups
        self._places = Places(sizes)
        self._sizes = np.array(sizes, np.int64)
        if not len(self):
            raise InputError(f"{config.path} has no rows; it needs at least one pair")
        self._reading: dict[int, threading.Lock] = {}
        self._read = functools.lru_cache(maxsize=_OPEN_GROUPS)(self._read_group)

    def __len__(self) -> int:
        return len(self._places)

    def _read_group(self, group: int) -> pa.Table:
        """Read a row group: its columns, and what is stored between them, in one request."""
        number, local = self._groups[group]
        begin, end = self._span(group)
        (data,) = files.read_ranges(self._paths[number], [(begin, end - begin)])
        file = pq.ParquetFile(_Part(data, begin), metadata=self._metadata[number])
        return file.read_row_group(local, columns=self._columns, use_threads=False)

    def _span(self, group: int) -> tuple[int, int]:
        """Return where the bytes of a row group's columns begin and end."""
        number, local = self._groups[group]
        row_group = self._metadata[number].row_group(local)
        spans = []
        for i in range(row_group.num_columns):
            column = row_group.column(i)
            if any(f"{column.path_in_schema}.".startswith(f"{x}.") for x in self._columns):
                starts = (column.dictionary_page_offset, column.data_page_offset)
                begin = min(start for start in starts if start)
                spans.append((begin, begin + column.total_compressed_size))
        return min(begin for begin, _ in spans), max(end for _, end in spans)

    @functools.cached_property
    def _edges(self) -> Int64[np.ndarray, " edges"]:
        """Return the bytes before each row group, and in total."""
        spans = map(self._span, range(len(self._groups)))
        return np.cumsum([0, *(end - begin for begin, end in spans)])

    def blocks(self) -> Int64[np.ndarray, " blocks"]:
        """Return the number of rows in each row group."""
        return self._sizes

    def size(self, first: int, last: int) -> int:
        """Estimate the bytes of these rows by the mean of their row group."""
        before = np.concatenate([[0], np.cumsum(self._sizes)])
        return int(np.diff(np.interp([first, last], before, self._edges))[0])

    def fetch(self, first: int, last: int) -> list[StoredRecord]:
        """Read rows of one row group, which reads all of it."""
        group, row = self._places.find(first)
        table = self._table(group).slice(row, last - first)
        return [
            record_of(table, self._columns, i, self.key(first + i)) for i in range(last - first)
        ]

    def key(self, index: int) -> str:
        """Return the file and the row."""
        group, row = self._places.find(index)
        number, local = self._groups[group]
        before = sum(self._metadata[number].row_group(g).num_rows for g in range(local))
        return f"{self._paths[number]}:{before + row}"

    def record(self, index: int) -> StoredRecord:
        """Return one row."""
        return self.fetch(index, index + 1)[0]

    def scores(self, column: str) -> Float64[np.ndarray, " N"]:
        """Return a numeric column of all files."""
        tables = ((path, scores.read_parquet(path, [column])) for path in self._paths)
        return np.concatenate([scores.numbers(path, table, column) for path, table in tables])

    def _table(self, group: int) -> pa.Table:
        # Without the lock every thread that wants this group would decode it.
        lock = self._reading.setdefault(group, threading.Lock())
        try:
            with lock:
                return self._read(group)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise SampleError(f"row group {self._groups[group][1]}: {error}") from error


class _Part(io.BytesIO):
    """A file of which only the bytes from `begin` on are in memory, at their own offsets."""

    def __init__(self, data: bytes, begin: int) -> None:
        super().__init__(data)
        self._begin = begin

    def tell(self) -> int:
        return self._begin + super().tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET:
            offset -= self._begin
            if offset < 0:
                raise OSError(errno.EINVAL, "a column begins before the offset in its footer")
        return self._begin + super().seek(offset, whence)


def _metadata(path: str) -> Any:
    """Read a file's footer, or return its name and what is wrong with it."""
    try:
        with files.open_file(path) as file:
            metadata = pq.read_metadata(file)
        _ = metadata.schema.to_arrow_schema().names
        rows = [metadata.row_group(g).num_rows for g in range(metadata.num_row_groups)]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        return f"{path} ({error})"
    if sum(rows) != metadata.num_rows or min(rows, default=0) < 0:
        return f"{path} ({metadata.num_rows} rows in its footer, {sum(rows)} in its row groups)"
    return metadata


def record_of(table: pa.Table, columns: list[str], row: int, key: str) -> StoredRecord:
    """Return a row of an Arrow table."""
    image, text = (functools.partial(_cell, table, name, row) for name in columns)
    return StoredRecord(key, table.nbytes // len(table), lambda: _image(image()), text)


def _image(image: Any) -> bytes:
    if isinstance(image, dict):  # Hugging Face's Image feature
        image = image.get("bytes")
    if not isinstance(image, bytes):
        what = "missing" if image is None else f"{type(image).__name__}, not encoded bytes"
        raise SampleError(f"image is {what}")
    return image


def _cell(table: pa.Table, name: str, row: int) -> Any:
    """Convert a cell to Python. Raises SampleError for text that is not UTF-8."""
    try:
        return table[name][row].as_py()
    except UnicodeDecodeError as error:
        raise SampleError(f"{name} is not UTF-8: {error.reason} at {error.start}") from error
