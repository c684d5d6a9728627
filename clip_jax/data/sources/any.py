"""Open any single source: all configs, and the one that a path stands for."""

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from clip_jax import parts
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.sources import Source, SourceConfig, StoredSource
from clip_jax.data.sources.array_record import ArrayRecordConfig
from clip_jax.data.sources.image_folder import FolderConfig
from clip_jax.data.sources.parquet import ParquetConfig
from clip_jax.data.sources.saved_dataset import SavedDatasetConfig
from clip_jax.data.sources.shards import BadShards
from clip_jax.data.sources.tar import TarConfig
from clip_jax.data.sources.text_table import TableConfig
from clip_jax.data.sources.tfds import TfdsConfig
from clip_jax.errors import InputError
from clip_jax.storage import files

_IN_FOLDERS = (TarConfig, ArrayRecordConfig, ParquetConfig)  # shards that a folder may hold


@dataclass(frozen=True, kw_only=True)
class PathConfig(SourceConfig):
    """A source whose format follows from the path's ending or from what the folder contains."""

    path: str  # Tars, Parquet, ArrayRecord or a table, or a folder of those, of TFDS or of images.
    image_column: str = ""  # Column (or feature) of the images; empty: the format's default.
    caption_column: str = ""  # Column, feature or key in a tar's .json; empty: the default.
    bad_shards: BadShards = "error"  # Missing or damaged shards: stop with an error, or skip them.
    # Captions of class folders, such as "a photo of a {}" (see FolderConfig). Empty: none.
    templates: tuple[str, ...] = ()

    def open(self, image_size: int, process: tuple[int, int]) -> Source:
        return guess_source(self).open(image_size, process)


# A new format needs a line here. Its config lists the path's endings, if any, in `suffixes`.
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


def _by_suffix(kinds: Iterable[Any]) -> dict[str, Any]:
    """Return the kind of source by the endings of its files. Raises InputError if two kinds claim
    one ending."""
    owners: dict[str, Any] = {}
    for kind in kinds:
        for suffix in kind.suffixes:
            if (other := owners.setdefault(suffix, kind)) is not kind:
                names = f"{other.__name__} and {kind.__name__}"
                raise InputError(f"{names} both open files that end in {suffix}; change `suffixes`")
    return owners


def open_single(
    config: SingleConfig,
    image_size: int,
    process: tuple[int, int] = (0, 1),
    option: str = "data.source",
) -> Source:
    """Open the source that a config describes; a source that draws does so at `image_size` pixels.

    `process` is (index, count) of this process: all processes share the building of an index.
    Raises InputError, which begins with the `option` that set the config.
    """
    try:
        return config.open(image_size, process)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def open_images(path: str, image_column: str = "image", option: str = "SOURCE") -> StoredSource:
    """Open images that need no captions: a folder, a table, tars, Parquet or ArrayRecord.

    Raises InputError if the source does not exist or has no images.
    """
    config = PathConfig(path=path)
    try:
        folder = files.as_path(path)
        kind = FolderConfig(path=path) if folder.is_dir() else guess_source(config)
    except InputError as error:
        raise InputError(f"{option}: {error}") from error
    if isinstance(kind, TableConfig):
        kind = dataclasses.replace(kind, image_column=image_column, caption_column="")
    source = open_single(kind, image_size=1, option=option)
    assert isinstance(source, StoredSource), path  # a source with a path never draws
    return source


def absolute(path: str) -> str:
    """Make a path for `open_images` independent of the working directory."""
    return path if files.is_remote(path) else os.path.abspath(os.path.expanduser(path))


def guess_source(config: PathConfig) -> SingleConfig:
    """Choose the format by a path's ending or a folder's content. Raises InputError if neither
    determines it."""
    path = config.path
    folder = files.as_path(path)
    by_suffix = _by_suffix(get_args(parts.opened(SingleConfig)))
    kind = by_suffix.get(folder.suffix)
    if kind is None and folder.is_dir():
        names = {x.name for x in folder.iterdir() if not x.name.startswith(".")}
        shards = [x for x in _IN_FOLDERS if any(name.endswith(x.suffixes[0]) for name in names)]
        if "state.json" in names:
            kind = SavedDatasetConfig
        elif "dataset_info.json" in names:
            kind = TfdsConfig
        elif shards:
            kind, path = shards[0], f"{files.escape(path.rstrip('/'))}/*{shards[0].suffixes[0]}"
        else:
            kind = FolderConfig
    if kind is None:
        if not (files.is_pattern(path) or folder.exists()):
            raise InputError(f"{path} does not exist; correct the path")
        raise InputError(
            f"{path} is not a data source; use files that end in {', '.join(by_suffix)}, or a "
            "folder of such files, of images, of save_to_disk or of a TFDS version"
        )
    optional = ("image_column", "caption_column", "templates")
    options: dict[str, Any] = {name: x for name in optional if (x := getattr(config, name))}
    if kind is TarConfig and config.caption_column:
        options["caption"], options["caption_key"] = "json", options.pop("caption_column")
    names = {field.name for field in dataclasses.fields(kind)}
    if not options.keys() <= names:
        extra = ", ".join(name for name in options if name not in names)
        raise InputError(f"{path} ({kind.__name__}) does not take {extra}; leave that out")
    if "bad_shards" in names:
        options["bad_shards"] = config.bad_shards
    return kind(path=path, **options)
