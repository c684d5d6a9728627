"""A folder of images, captioned by .txt files of the same name or by the names of subfolders."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from clip_jax.data.class_folders import SPLITS, read_classes
from clip_jax.data.images import SUFFIXES
from clip_jax.data.sources import SourceConfig, StoredRecord, StoredSource, read_file
from clip_jax.data.sources.shards import listed, warn_once
from clip_jax.errors import InputError
from clip_jax.models.templates import check_template, fill
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath


@dataclass(frozen=True, kw_only=True)
class FolderConfig(SourceConfig):
    """A folder of images with captions in text files (a/cat.jpg, a/cat.txt), or class folders."""

    path: str  # Folder with the images; subfolders are included.
    # Captions of class folders, such as "a photo of a {}", of which one is drawn per sample: {} is
    # the class's name, as `evaluate --dataset folder:PATH` reads it. Empty: captions are in .txt
    # files.
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for template in self.templates:
            check_template(template, "templates")

    def open(self, *_: Any) -> "FolderSource":
        return FolderSource(self)


def image_files(paths: Iterable[AnyPath], beside: Sequence[str] = ()) -> list[AnyPath]:
    """List these files, and the images in these folders in alphabetical order.

    Dot files, such as macOS's ._photo.jpg, and hidden folders are left out. A warning counts other
    files whose ending is neither an image's nor one of `beside`.
    """
    images, folders, ignored = [], {}, Counter()
    for path in paths:
        if not path.is_dir():
            images.append(path)
            continue
        for file in sorted(map(files.as_path, files.walk(path))):
            suffix = file.suffix.lower()
            if any(part.startswith(".") for part in file.relative_to(path).parts):
                continue
            if suffix in SUFFIXES:
                images.append(file)
            elif suffix not in beside:
                ignored[suffix or "without an ending"] += 1
                folders[str(path)] = True
    if ignored:
        kinds = listed(f"{count:,} {suffix}" for suffix, count in ignored.most_common())
        warn_once(
            f"{ignored.total():,} files in {listed(folders)} are ignored: {kinds}. Images end in "
            f"{', '.join(SUFFIXES)}"
        )
    return images


class FolderSource(StoredSource):
    """One pair for each image, in alphabetical order. Raises InputError if there is no image."""

    def __init__(self, config: FolderConfig) -> None:
        self._folder = files.as_path(config.path)
        if not self._folder.is_dir():
            if not self._folder.exists():
                raise InputError(f"there is no folder {config.path}; correct the path")
            raise InputError(
                f"{config.path} is not a folder, and this config reads folders of images; other "
                "formats need a config whose source is a PathConfig, such as pairs"
            )
        paths = image_files([self._folder], beside=[".txt"])
        self._names = sorted(path.relative_to(self._folder).as_posix() for path in paths)
        if not self._names:
            raise InputError(f"{self._folder} has no images, which end in {', '.join(SUFFIXES)}")
        self._templates = config.templates
        self.classes, self._labels = self._read_classes() if config.templates else ((), {})

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """Return the image's path in the folder."""
        return self._names[index].encode(errors="surrogateescape").decode(errors="replace")

    def record(self, index: int) -> StoredRecord:
        """Return the image file and the text file, each read on demand."""
        path = self._folder / self._names[index]
        image = functools.partial(read_file, path, path.suffix)
        if (label := self._labels.get(self._names[index].split("/")[0])) is not None:
            name = self.classes[label]
            captions = [fill(template, name) for template in self._templates]
            return StoredRecord(self.key(index), 0, image, lambda: captions, label=label)
        what = (
            "caption file (class folders need --data.source.templates in training; prepare takes "
            "only images with caption files)"
        )
        text = functools.partial(read_file, path.with_suffix(".txt"), what)
        return StoredRecord(self.key(index), 0, image, text)

    def _read_classes(self) -> tuple[tuple[str, ...], dict[str, int]]:
        """Return the classes and their folders' numbers; all images must be in such folders."""
        parts = [name.split("/") for name in self._names]
        if {names[0].lower() for names in parts} <= {*SPLITS} and max(map(len, parts)) > 2:
            splits = sorted({names[0] for names in parts})
            raise InputError(
                f"{self._folder} has the splits {listed(splits)}, not class folders; give one of "
                f"them, such as {self._folder / splits[-1]}"
            )
        if loose := next((name for name in self._names if "/" not in name), None):
            raise InputError(f"{self._folder}/{loose} is in no class folder; templates need one")
        classes = read_classes(self._folder)
        return tuple(classes.values()), {folder: label for label, folder in enumerate(classes)}
