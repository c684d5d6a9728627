"""Images alone, whatever is said of them: a folder, a table's column, the images of tars."""

import hashlib
import os
from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

import numpy as np

from clip_jax.data.images import SUFFIXES
from clip_jax.data.sources import BlockSource, read_file
from clip_jax.data.sources.image_folder import image_files
from clip_jax.data.sources.tar import TarConfig, TarSource
from clip_jax.data.sources.text_table import TableConfig, TableSource
from clip_jax.errors import InputError
from clip_jax.storage import files
from clip_jax.storage.files import Place


@runtime_checkable
class Images(Protocol):
    """Encoded images by index. Threads share it."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name one image, the same in every run, so that a person finds it."""
        ...

    def image(self, index: int) -> bytes:
        """Get the encoded image. Raises SampleError if it cannot be read."""
        ...


def open_images(source: str, image_column: str = "image") -> Images:
    """Open a folder of images, a table with a column of paths, or a pattern of tars.

    Captions need not be there. Raises InputError if there is no such source or no image in it.
    """
    if source.endswith((".csv", ".tsv", ".jsonl", ".ndjson")):
        return TableSource(TableConfig(path=source, image_column=image_column, caption_column=""))
    if source.endswith((".tar", ".tar.gz", ".tgz")):
        return TarSource(TarConfig(path=source))
    path = files.place(source)
    if path.is_dir():
        return FolderImages(path)
    raise InputError(
        f"no images at {source}; it takes a folder, a .csv, .tsv or .jsonl, or tars "
        "(data/{00000..00041}.tar)."
    )


def fingerprint(images: Images) -> str:
    """Hash what tells images and their order: names of files; of a table its paths; of shards, or
    their parts, the names and how many samples each has."""
    digest = hashlib.sha256(f"{len(images)}\n".encode())
    names: Iterable[Any]
    if isinstance(images, TableSource):
        names = images.rows.paths()
    elif isinstance(images, TarSource):
        names = (f"{os.path.basename(path)} {count}" for path, count in images.shards())
    elif isinstance(images, BlockSource):
        starts = np.cumsum([0, *images.blocks()])
        names = (images.key(int(start)) for start in starts if start < len(images))
    else:
        names = map(images.key, range(len(images)))
    for name in names:
        digest.update(name.encode(errors="replace") if isinstance(name, str) else name)
        digest.update(b"\n")
    return digest.hexdigest()[:12]


def absolute(source: str) -> str:
    """Make what `open_images` takes independent of the working directory."""
    return source if files.is_remote(source) else os.path.abspath(os.path.expanduser(source))


class FolderImages:
    """Images of a folder and the folders in it, by path."""

    def __init__(self, folder: Place) -> None:
        self._folder = folder
        self._names = [path.relative_to(folder).as_posix() for path in image_files([folder])]
        if not self._names:
            raise InputError(f"{folder} has no images ({', '.join(SUFFIXES)}).")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The image's path in the folder."""
        return self._names[index].encode(errors="surrogateescape").decode(errors="replace")

    def image(self, index: int) -> bytes:
        """Get the file's bytes."""
        return read_file(self._folder / self._names[index], "unreadable")
