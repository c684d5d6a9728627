"""A folder of images, each with its caption in a .txt of the same name."""

from dataclasses import dataclass

import numpy as np

from clip_jax import files
from clip_jax.data.sources import captions_of, read_file
from clip_jax.data.sources.tar_members import IMAGES
from clip_jax.refused import Refused


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """Images and sidecar texts: a/cat.jpg and a/cat.txt."""

    path: str  # of the folder; folders in it count too


class FolderSource:
    """One pair an image, by path in alphabetical order. Refused if there is no image."""

    def __init__(self, config: FolderConfig) -> None:
        self._folder = files.place(config.path)
        if not self._folder.is_dir():
            raise Refused(f"no folder at {config.path}; set data.source.path")
        paths = map(files.place, files.walk(self._folder))
        self._names = [
            path.relative_to(self._folder).as_posix()
            for path in paths
            if path.suffix.lower()[1:] in IMAGES and not path.name.startswith(".")
        ]
        if not self._names:
            raise Refused(
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
        path = self._folder / self._names[index]
        return read_file(path, path.suffix)

    def captions(self, index: int) -> list[str]:
        """Get the text file's content, one caption."""
        text = (self._folder / self._names[index]).with_suffix(".txt")
        return captions_of(read_file(text, ".txt"))
