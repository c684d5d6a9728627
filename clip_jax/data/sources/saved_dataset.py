"""Folders that Hugging Face's `Dataset.save_to_disk` writes, read without `datasets`."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float64

from clip_jax.data.sources import captions_of, scores
from clip_jax.data.sources.parquet import cell, check_columns, image_of, pair_of


@dataclass(frozen=True, kw_only=True)
class SavedDatasetConfig:
    """A folder of `save_to_disk` whose images are stored inside."""

    path: str  # of the folder with state.json; of a DatasetDict, one split's folder
    image_column: str = "image"
    caption_column: str = "caption"  # text, or lists of texts of which one is drawn each time


class SavedDatasetSource:
    """One pair a row; the files stay on disk, mapped. ValueError for folders not usable."""

    def __init__(self, config: SavedDatasetConfig) -> None:
        folder = Path(config.path).expanduser()
        if (folder / "dataset_dict.json").is_file():
            splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
            raise ValueError(
                f"{folder} holds several splits; set data.source.path to one of "
                f"{', '.join(str(folder / split) for split in splits)}"
            )
        try:
            state = json.loads((folder / "state.json").read_text())
            names = [file["filename"] for file in state["_data_files"]]
            if state.get("_indices_data_files"):
                raise ValueError("it keeps an order of its own: call flatten_indices() first")
            parts = [pa.ipc.open_stream(pa.memory_map(str(folder / n))).read_all() for n in names]
            for name, part in zip(names, parts, strict=True):
                check_columns(name, part.schema, config.image_column, config.caption_column)
        except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
            raise ValueError(
                f"{folder} is no usable folder of save_to_disk: {error}; see data.source.path"
            ) from error
        self._columns = [config.image_column, config.caption_column]
        self._names, self._parts = names, parts
        self._ends = np.cumsum([part.num_rows for part in parts], dtype=np.int64)
        if not len(self):
            raise ValueError(f"{folder} has no rows; data.source.path needs at least one")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _find(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)

    def key(self, index: int) -> str:
        """File and row."""
        part, row = self._find(index)
        return f"{self._names[part]}:{row}"

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        """Get the encoded image and the caption."""
        part, row = self._find(index)
        return pair_of(self._parts[part], self._columns, row, rng)

    def image(self, index: int) -> bytes:
        """Get the encoded image."""
        part, row = self._find(index)
        return image_of(self._parts[part], self._columns[0], row)

    def captions(self, index: int) -> list[str]:
        """Get all texts of the caption's cell."""
        part, row = self._find(index)
        return captions_of(cell(self._parts[part], self._columns[1], row))

    def scores(self, column: str) -> Float64[np.ndarray, " N"]:
        """Get a column of numbers from all files."""
        parts = zip(self._names, self._parts, strict=True)
        return np.concatenate([scores.numbers(name, part, column) for name, part in parts])
