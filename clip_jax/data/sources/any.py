"""Any one source: the configs there are, and what opens each."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from clip_jax.data.digits import DigitsConfig, DigitsSource
from clip_jax.data.sources import Source
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource
from clip_jax.data.sources.image_folder import FolderConfig, FolderSource
from clip_jax.data.sources.parquet import ParquetConfig, ParquetSource
from clip_jax.data.sources.saved_dataset import SavedDatasetConfig, SavedDatasetSource
from clip_jax.data.sources.shards import BadShards
from clip_jax.data.sources.tar import TarConfig, TarSource
from clip_jax.data.sources.text_table import TableConfig, TableSource
from clip_jax.data.sources.tfds import TfdsBucketSource, TfdsConfig, TfdsSource
from clip_jax.errors import InputError
from clip_jax.storage import files

_SUFFIXES: dict[str, Any] = {
    **dict.fromkeys((".tar", ".gz", ".tgz"), TarConfig),  # which says why it reads no gzip
    ".array_record": ArrayRecordConfig,
    ".parquet": ParquetConfig,
    **dict.fromkeys((".csv", ".tsv", ".jsonl", ".ndjson"), TableConfig),
}
_OF_FOLDERS = (".tar", ".array_record", ".parquet")  # what a folder may hold, in this order


@dataclass(frozen=True, kw_only=True)
class PathConfig:
    """Pairs in whatever format the path's ending says, or what is in the folder."""

    path: str  # tars, Parquet, ArrayRecord, a table; a folder of those, of TFDS, of images
    image_column: str = ""  # where the format has columns; empty: its default
    caption_column: str = ""  # column, feature, or key of the .json in tars; empty: the default
    bad_shards: BadShards = "error"  # missing, truncated or damaged ones


SingleConfig = (
    PathConfig
    | DigitsConfig
    | TableConfig
    | TarConfig
    | FolderConfig
    | ParquetConfig
    | ArrayRecordConfig
    | TfdsConfig
    | SavedDatasetConfig
)


def open_single(config: SingleConfig, image_size: int, process: tuple[int, int] = (0, 1)) -> Source:
    """Open what a source's config describes; sources that draw do so in `image_size` pixels.

    `process` is which of several processes' this is: they share the building of an index.
    """
    match config:
        case PathConfig():
            return open_single(guess_source(config), image_size, process)
        case DigitsConfig():
            return DigitsSource(config, image_size)
        case TableConfig():
            return TableSource(config)
        case TarConfig():
            return TarSource(config, process)
        case FolderConfig():
            return FolderSource(config)
        case ParquetConfig():
            return ParquetSource(config)
        case ArrayRecordConfig():
            return ArrayRecordSource(config)
        case TfdsConfig():
            return (TfdsBucketSource if files.is_remote(config.path) else TfdsSource)(config)
        case SavedDatasetConfig():
            return SavedDatasetSource(config)


def guess_source(config: PathConfig) -> SingleConfig:
    """Tell the format by a path's ending, or by what a folder holds. Raises InputError if neither
    does."""
    path = config.path
    folder = files.place(path)
    kind = _SUFFIXES.get(folder.suffix)
    if kind is None and folder.is_dir():
        names = {x.name for x in folder.iterdir() if not x.name.startswith(".")}
        inside = [s for s in _OF_FOLDERS if any(name.endswith(s) for name in names)]
        if "state.json" in names:
            kind = SavedDatasetConfig
        elif "dataset_info.json" in names:
            kind = TfdsConfig
        elif inside:
            kind, path = _SUFFIXES[inside[0]], f"{path.rstrip('/')}/*{inside[0]}"
        else:
            kind = FolderConfig
    if kind is None:
        if not (any(sign in path for sign in "*?[{") or folder.exists()):
            raise InputError(f"there is nothing at {path}; set --data.source.path")
        raise InputError(
            f"{path} (data.source.path) is not a data source: give files that end in "
            f"{', '.join(_SUFFIXES)}, or a folder of such files, of images, of save_to_disk or of "
            "a TFDS version"
        )
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    given = {name: value for name, value in columns.items() if value}
    if kind is TarConfig and config.caption_column:
        given["caption"], given["caption_key"] = "json", given.pop("caption_column")
    names = {field.name for field in dataclasses.fields(kind)}
    if not given.keys() <= names:
        raise InputError(f"{path} ({kind.__name__}) has no columns: leave {', '.join(given)} out")
    if "bad_shards" in names:
        given["bad_shards"] = config.bad_shards
    return kind(path=path, **given)
