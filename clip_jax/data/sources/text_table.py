"""Tables of image paths and captions: CSV, TSV and JSONL."""

import contextlib
import csv
import functools
import itertools
import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from clip_jax.data import sources
from clip_jax.errors import InputError
from clip_jax.storage import files

_DELIMITERS = {".csv": ",;\t", ".tsv": "\t"}  # Excel's depends on the locale
_LONGEST = 1 << 24  # maximum characters of a cell
_ROWS = 1 << 14  # rows converted to arrays at once
_END = "\0the end"
_PEEK_LINES = 100  # lines of a JSONL that are read to find its columns


@dataclass(frozen=True, kw_only=True)
class TableConfig(sources.SourceConfig):
    """A table of image paths and captions: .csv, .tsv or .jsonl."""

    path: str  # A .csv or .tsv with a header, or a .jsonl; image paths are relative to its folder.
    image_column: str = "image"  # Column of the image paths.
    caption_column: str = "caption"  # Column of the captions; empty: images without captions.
    suffixes: ClassVar[tuple[str, ...]] = (".csv", ".tsv", ".jsonl", ".ndjson")

    def open(self, *_: Any) -> "TableSource":
        return TableSource(self)


class TableSource(sources.StoredSource):
    """One pair for each row. Raises InputError if the file, a column or all rows are missing."""

    def __init__(self, config: TableConfig) -> None:
        path = files.as_path(config.path)
        if not path.is_file():
            raise InputError(f"no table at {config.path}; give a .csv, .tsv or .jsonl file")
        if path.suffix not in config.suffixes:
            raise InputError(f"{path} ends in {path.suffix!r}, not {', '.join(config.suffixes)}")
        kind = _Delimited if path.suffix in _DELIMITERS else _JsonLines
        with files.local(path) as copy:
            self.rows: _Delimited | _JsonLines = kind(copy, config)
        if not len(self.rows):
            raise InputError(f"{path} has no rows; it needs at least one pair")
        self._folder = path.parent

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, index: int) -> str:
        """Return the row (1 follows the header) or the line of a JSONL, and the image path."""
        number = self.rows.number(index)
        try:
            image, _ = self.rows[index]
        except sources.SampleError:
            return f"{number}:"
        shown = image if isinstance(image, bytes) else str(image).encode(errors="replace")
        return f"{number}:{shown.decode(errors='replace')}"

    def record(self, index: int) -> sources.StoredRecord:
        """Return a row: the image's file, and the caption, or a list of captions in a JSONL."""
        image, text = self.rows[index]
        return sources.StoredRecord(
            self.key(index), 0, functools.partial(self._image, image), lambda: text
        )

    def _image(self, value: Any) -> bytes:
        image = sources.text_of(value, "image path")
        if not image:
            raise sources.SampleError("image path is empty")
        try:
            path = files.as_path(image) if files.is_remote(image) else self._folder / image
        except InputError as error:
            raise sources.SampleError(str(error)) from error
        return sources.read_file(path, "image file")


class _Delimited:
    """Both columns in memory as Arrow arrays: the text and 8 bytes for each row.

    Rows with too few or too many cells are samples that cannot be read. Cells that are not UTF-8
    stay bytes and make only their own sample unusable.
    """

    def __init__(self, path: Path, config: TableConfig) -> None:
        signs = _DELIMITERS[path.suffix]
        fit = (sign for sign in signs if config.image_column in next(_rows(path, sign), []))
        delimiter = next(fit, signs[0])
        rows = _rows(path, delimiter)
        columns = next(rows, [])
        sources.check_columns(path, config, columns)
        names = filter(None, (config.image_column, config.caption_column))
        places = [columns.index(name) for name in names]
        empty = [""] * len(columns)
        self._malformed: dict[int, str] = {}  # what is wrong with a row
        chunks = []
        count = 0
        try:
            while block := list(itertools.islice(rows, _ROWS)):
                for number, row in enumerate(block):
                    if len(row) != len(columns):
                        self._malformed[count + number] = (
                            f"row has {len(row)} cells, the header {len(columns)}: "
                            f"{delimiter.join(row)!r:.200}"
                        )
                        block[number] = empty
                cells = ([row[i].encode(errors="surrogateescape") for row in block] for i in places)
                chunks.append([pa.array(column, pa.binary()) for column in cells])
                count += len(block)
        except csv.Error as error:
            raise InputError(f"{path} cannot be parsed: {error}; check its quotes") from error
        self._count = count
        self._columns = [
            pa.chunked_array(list(parts), pa.binary()) for parts in zip(*chunks, strict=True)
        ]

    def __len__(self) -> int:
        return self._count

    def number(self, index: int) -> int:
        """Return the row's number in the file, from 1."""
        return index + 1

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        if index in self._malformed:
            raise sources.SampleError(self._malformed[index])
        image, *caption = (column[index].as_py() for column in self._columns)
        return image, caption[0] if caption else None


def _rows(path: Path, delimiter: str) -> Iterator[list[str]]:
    """Yield a file's rows, with the header. Raises csv.Error if it ends within quotes."""
    csv.field_size_limit(_LONGEST)
    row: list[str] = []
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        # Within quotes, the additional line does not become a row of its own.
        for following in csv.reader(itertools.chain(file, [_END]), delimiter=delimiter):
            if row:
                yield row
            row = following
    if row != [_END]:
        raise csv.Error("it ends within quotes")


class _JsonLines:
    """The file is memory-mapped; only the offsets of its lines are in memory."""

    def __init__(self, path: Path, config: TableConfig) -> None:
        if not path.stat().st_size:
            raise InputError(f"{path} is empty; it needs at least one pair")
        with path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        buffer = np.frombuffer(self._bytes, np.uint8)
        block = 1 << 24
        ends = np.concatenate(
            [
                start + np.flatnonzero(buffer[start : start + block] == ord("\n"))
                for start in range(0, len(buffer), block)
            ]
            + [[len(buffer)]]
        )
        starts = np.concatenate([[0], ends[:-1] + 1])
        full = ends > starts  # not the end after the last newline, nor an empty line
        self._starts, self._ends = starts[full], ends[full]
        empty = np.flatnonzero(~full)
        self._before = empty - np.arange(len(empty))  # lines before each empty one
        self._image, self._caption = config.image_column, config.caption_column
        columns: dict[str, None] = {}
        for index in range(min(len(self), _PEEK_LINES)):
            with contextlib.suppress(sources.SampleError):
                columns |= dict.fromkeys(self._parse(index))
        sources.check_columns(path, config, list(columns))

    def __len__(self) -> int:
        return len(self._starts)

    def number(self, index: int) -> int:
        """Return the line's number in the file, from 1."""
        return index + 1 + int(np.searchsorted(self._before, index, side="right"))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._parse(index)
        return row.get(self._image), row.get(self._caption)

    def _parse(self, index: int) -> dict[str, Any]:
        line = self._bytes[self._starts[index] : self._ends[index]]
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise sources.SampleError(f"line is not JSON in UTF-8: {error}") from error
        if not isinstance(row, dict):
            raise sources.SampleError(f"line is a JSON {type(row).__name__}, not an object")
        return row
