"""Images alone, whatever is said of them: a folder, a table's column, the images of tars."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol, runtime_checkable

from clip_jax.data.sources import SampleError, files
from clip_jax.data.sources.table import TableConfig, TableSource
from clip_jax.data.sources.tar import TarConfig, TarSource

SUFFIXES = {f".{name}" for name in ("jpg", "jpeg", "png", "webp", "gif", "avif", "bmp", "tif")}


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

    Captions need not be there. ValueError if there is no such source or no image in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return FolderImages(path)
    if source.endswith((".csv", ".tsv", ".jsonl", ".ndjson")):
        return TableSource(TableConfig(path=source, image_column=image_column, caption_column=""))
    if source.endswith((".tar", ".tar.gz", ".tgz")):
        return TarSource(TarConfig(path=source))
    raise ValueError(
        f"no images at {source}; it takes a folder, a .csv, .tsv or .jsonl, or tars "
        "(data/{00000..00041}.tar)."
    )


def absolute(source: str) -> str:
    """Make what `open_images` takes independent of the working directory."""
    return source if files.is_remote(source) else os.path.abspath(os.path.expanduser(source))


def image_files(paths: Iterable[Path]) -> Iterator[Path]:
    """Files as given, folders in alphabetical order with what is in them."""
    for path in paths:
        if path.is_dir():
            yield from sorted(
                Path(folder) / name
                for folder, _, names in os.walk(path, followlinks=True)
                for name in names
                if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
            )
        else:
            yield path


class FolderImages:
    """Images of a folder and the folders in it, by path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names = [path.relative_to(folder).as_posix() for path in image_files([folder])]
        if not self._names:
            raise ValueError(f"{folder} has no images ({', '.join(sorted(SUFFIXES))}).")

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The image's path in the folder."""
        return self._names[index].encode(errors="surrogateescape").decode(errors="replace")

    def image(self, index: int) -> bytes:
        """Get the file's bytes."""
        try:
            return (self._folder / self._names[index]).read_bytes()
        except OSError as error:
            raise SampleError(f"unreadable: {error.strerror}") from error
