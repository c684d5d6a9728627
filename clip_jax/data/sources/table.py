"""A CSV, TSV or JSONL of image paths and captions."""

import csv
import itertools
import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.data.sources import SampleError

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_LINES = (".jsonl", ".ndjson")
_PEEK_LINES = 100  # of a JSONL, to learn which columns it has


@dataclass(frozen=True, kw_only=True)
class TableConfig:
    """Pairs listed in one file."""

    path: str  # .csv or .tsv with a header, or .jsonl; images relative to its folder
    image_column: str = "image"  # column of the image's path
    caption_column: str = "caption"  # column of the text; empty: none, for images alone


class TableSource:
    """One pair a row. ValueError if the file, a column or every row is missing."""

    def __init__(self, config: TableConfig) -> None:
        path = Path(config.path).expanduser()
        if not path.is_file():
            raise ValueError(
                f"no table at {path.absolute()}; set data.source.path to a .csv, .tsv or .jsonl"
            )
        if path.suffix in _DELIMITERS:
            self._rows: _Delimited | _JsonLines = _Delimited(path, config)
        elif path.suffix in _LINES:
            self._rows = _JsonLines(path, config)
        else:
            raise ValueError(
                f"{path} ends in {path.suffix!r}; data.source.path takes "
                f"{', '.join([*_DELIMITERS, *_LINES])}"
            )
        if not len(self._rows):
            raise ValueError(f"{path} has no rows; data.source.path needs at least one pair")
        self._folder = path.parent

    def __len__(self) -> int:
        return len(self._rows)

    def key(self, index: int) -> str:
        """Row (the first after the header is 1) and image path."""
        try:
            image, _ = self._rows[index]
        except SampleError:
            return f"{index + 1}:"
        shown = image.decode(errors="replace") if isinstance(image, bytes) else image
        return f"{index + 1}:{shown}"

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        """Get the image file's bytes and the caption; nothing here is random."""
        return self.image(index), _text(self._rows[index][1], "caption")

    def captions(self, index: int) -> list[str]:
        """Get the one caption of the row."""
        return [_text(self._rows[index][1], "caption")]

    def image(self, index: int) -> bytes:
        """Get the image file's bytes."""
        image = _text(self._rows[index][0], "image path")
        if not image:
            raise SampleError("image path is empty")
        try:
            return (self._folder / image).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a NUL in the path
            reason = getattr(error, "strerror", None) or str(error)
            raise SampleError(f"image file: {reason}: {image!r:.300}") from error


def _text(cell: Any, name: str) -> str:
    if isinstance(cell, bytes):
        try:
            return cell.decode()
        except UnicodeDecodeError as error:
            raise SampleError(f"{name} is not UTF-8: {error.reason} at {error.start}") from error
    if not isinstance(cell, str):
        raise SampleError(f"{name} is {'missing' if cell is None else type(cell).__name__}")
    return cell


def _check_columns(path: Path, columns: list[str], config: TableConfig) -> None:
    for option in ("image_column", "caption_column"):
        name = getattr(config, option)
        if name not in columns and (name or option == "image_column"):
            raise ValueError(
                f"{path} has no column {name!r}, only {', '.join(map(repr, columns)) or 'none'}; "
                f"set data.source.{option}"
            )


class _Delimited:
    """Both columns in memory as Arrow holds them: the text and 8 bytes a row.

    Cells stay bytes, since Arrow would refuse the whole file for one that is not UTF-8. Rows with
    too few or too many cells come after the others, as samples that cannot be read.
    """

    def __init__(self, path: Path, config: TableConfig) -> None:
        import pyarrow as pa
        import pyarrow.csv

        delimiter = _DELIMITERS[path.suffix]
        with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
            columns = next(csv.reader(file, delimiter=delimiter), [])
        _check_columns(path, columns, config)
        names = [
            name.encode().decode("latin-1")
            for name in (config.image_column, config.caption_column)
            if name
        ]
        self._malformed: list[str] = []

        def keep(row: Any) -> str:
            self._malformed.append(
                f"row has {row.actual_columns} cells, the header {row.expected_columns}: "
                f"{row.text!r:.200}"
            )
            return "skip"

        try:
            with pyarrow.csv.open_csv(
                path,
                # Bytes as Latin-1 letters: Arrow would lose a malformed row that is not UTF-8.
                pyarrow.csv.ReadOptions(
                    use_threads=False,
                    encoding="latin-1",
                    column_names=[name.encode().decode("latin-1") for name in columns],
                    skip_rows_after_names=1,
                ),
                pyarrow.csv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=True, invalid_row_handler=keep
                ),
                pyarrow.csv.ConvertOptions(
                    include_columns=names, column_types=dict.fromkeys(names, pa.binary())
                ),
            ) as reader:
                table = reader.read_all()
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{path} (data.source.path) does not parse: {error}. A quote that never closes?"
            ) from error
        self._columns = [table[name] for name in names]

    def __len__(self) -> int:
        return len(self._columns[0]) + len(self._malformed)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        whole = len(self._columns[0])
        if index >= whole:
            raise SampleError(self._malformed[index - whole])
        cells = [column[index].as_py() for column in self._columns]
        image, *caption = (cell and cell.decode().encode("latin-1") for cell in cells)
        return image, caption[0] if caption else None


class _JsonLines:
    """The file stays on disk, mapped; in memory is where each line starts."""

    def __init__(self, path: Path, config: TableConfig) -> None:
        if not path.stat().st_size:
            raise ValueError(f"{path} is empty; data.source.path needs at least one pair")
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
        self._image, self._caption = config.image_column, config.caption_column
        columns = dict.fromkeys(
            itertools.chain.from_iterable(
                row for row in map(self._peek, range(min(len(self), _PEEK_LINES))) if row
            )
        )
        _check_columns(path, list(columns), config)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        row = self._parse(index)
        return row.get(self._image), row.get(self._caption)

    def _parse(self, index: int) -> dict[str, Any]:
        line = self._bytes[self._starts[index] : self._ends[index]]
        try:
            row = json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise SampleError(f"line is not JSON in UTF-8: {error}") from error
        if not isinstance(row, dict):
            raise SampleError(f"line is a JSON {type(row).__name__}, not an object")
        return row

    def _peek(self, index: int) -> dict[str, Any] | None:
        try:
            return self._parse(index)
        except SampleError:
            return None
