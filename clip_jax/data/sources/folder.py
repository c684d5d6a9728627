"""A folder of images, each with its caption in a .txt of the same name."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clip_jax.data.sources import SampleError, captions_of
from clip_jax.data.sources.tar import IMAGES


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Images and sidecar texts: a/cat.jpg and a/cat.txt."""

    path: str  # of the folder; folders in it count too


class FolderSource:
    """One pair an image, by path in alphabetical order. ValueError if there is no image."""

    def __init__(self, config: FolderConfig) -> None:
        self._folder = Path(config.path).expanduser()
        if not self._folder.is_dir():
            raise ValueError(f"no folder at {self._folder.absolute()}; set data.source.path")
        self._names = sorted(
            os.path.relpath(os.path.join(folder, name), self._folder)
            for folder, _, names in os.walk(self._folder, followlinks=True)
            for name in names
            if name.rpartition(".")[2].lower() in IMAGES and not name.startswith(".")
        )
        if not self._names:
            raise ValueError(
                f"{self._folder} has no images ({', '.join(IMAGES)}); set data.source.path"
            )

    def __len__(self) -> int:
        return len(self._names)

    def key(self, index: int) -> str:
        """The image's path in the folder."""
        return self._names[index].encode(errors="surrogateescape").decode(errors="replace")

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        """Get the image file's bytes and the text file's content; nothing here is random."""
        return self.image(index), self.captions(index)[0]

    def image(self, index: int) -> bytes:
        """Get the image file's bytes."""
        return _read(self._folder / self._names[index])

    def captions(self, index: int) -> list[str]:
        """Get the text file's content, one caption."""
        return captions_of(_read((self._folder / self._names[index]).with_suffix(".txt")))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"{path.suffix}: {error.strerror}") from error
