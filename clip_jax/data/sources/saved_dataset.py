"""Folders written by Hugging Face's `Dataset.save_to_disk`, read without `datasets`."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from clip_jax.data.sources import SourceConfig, StoredRecord, StoredSource, check_columns, scores
from clip_jax.data.sources.parquet import record_of
from clip_jax.data.sources.shards import Places
from clip_jax.errors import InputError
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import content_of


@dataclass(frozen=True, kw_only=True)
class SavedDatasetConfig(SourceConfig):
    """A folder of Hugging Face's `save_to_disk` that contains the images."""

    path: str  # Folder with state.json; for a DatasetDict, the folder of one split.
    image_column: str = "image"  # Column of encoded images, or structs with `bytes`.
    caption_column: str = "caption"  # Column of captions, or lists of which one is drawn.

    def open(self, *_: Any) -> "SavedDatasetSource":
        return SavedDatasetSource(self)


class SavedDatasetSource(StoredSource):
    """One pair for each row; files are memory-mapped. Raises InputError for unusable folders."""

    def __init__(self, config: SavedDatasetConfig) -> None:
        folder = files.as_path(config.path)
        if (folder / "dataset_dict.json").is_file():
            splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
            raise InputError(
                f"{folder} holds several splits; give one of "
                f"{', '.join(str(folder / split) for split in splits)}"
            )
        self._names = _data_files(folder)
        try:
            with files.local(folder) as copy:
                for name in self._names:
                    files.check_kind(copy / name)
                self._tables = [
                    pa.ipc.open_stream(pa.memory_map(str(copy / name))).read_all()
                    for name in self._names
                ]
        except (OSError, pa.ArrowException) as error:
            raise InputError(_unusable(folder, error)) from error
        for name, table in zip(self._names, self._tables, strict=True):
            check_columns(name, config, table.schema.names)
        self._columns = [config.image_column, config.caption_column]
        self._places = Places(table.num_rows for table in self._tables)
        if not len(self):
            raise InputError(f"{folder} has no rows; it needs at least one pair")

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        """Return the file and the row."""
        file, row = self._places.find(index)
        return f"{self._names[file]}:{row}"

    def record(self, index: int) -> StoredRecord:
        """Return one row."""
        file, row = self._places.find(index)
        return record_of(self._tables[file].slice(row, 1), self._columns, 0, self.key(index))

    def scores(self, column: str) -> Float64[np.ndarray, " N"]:
        """Return a numeric column of all files."""
        tables = zip(self._names, self._tables, strict=True)
        return np.concatenate([scores.numbers(name, table, column) for name, table in tables])


def _data_files(folder: AnyPath) -> list[str]:
    """List the Arrow files. Raises InputError for a folder that save_to_disk did not write."""
    try:
        state = json.loads(content_of(folder / "state.json"))
        names = [str(file["filename"]) for file in state["_data_files"]]
        is_reordered = bool(state.get("_indices_data_files"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(_unusable(folder, error)) from error
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            _unusable(folder, f"its state.json lists no data files: {error!r}")
        ) from error
    if is_reordered:
        raise InputError(
            _unusable(folder, "its rows are selected by indices: call flatten_indices() first")
        )
    return names


def _unusable(folder: AnyPath, why: object) -> str:
    return f"{folder} is not a usable folder of save_to_disk: {why}"
