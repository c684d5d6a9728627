"""Find training images that are near-duplicates of evaluation images (CLIP paper, section 5)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt64

from clip_jax.data.images import ImageError, decode
from clip_jax.data.sources import SampleError, StoredSource
from clip_jax.errors import InputError
from clip_jax.prepare import near
from clip_jax.prepare.near import Hash, Hashes
from clip_jax.storage import files


def named(sets: tuple[str, ...]) -> dict[str, str]:
    """Parse `NAME=SOURCE`, or a source alone, which is named after its file or folder. Raises
    InputError for a repeated name."""
    by_name: dict[str, str] = {}
    for text in sets:
        name, equals, source = text.partition("=")
        if not equals:
            source = text
            path = files.as_path(text.rstrip("/"))
            name = path.parent.name if "*" in path.name or "{" in path.name else path.stem
        if not name or not source or name in by_name:
            raise InputError(
                f"decontaminate={text!r} lacks a part or repeats a name; give NAME=SOURCE, each "
                "name once"
            )
        by_name[name] = source
    return by_name


def hash_image(images: StoredSource, index: int) -> Hash | None:
    """Hash a test image; None if it is plain or cannot be read."""
    try:
        return near.perceptual_hash(decode(images.image(index)))
    except (SampleError, ImageError):
        return None


@dataclass(frozen=True)
class EvaluationImages:
    """The perceptual hashes of the test images of all evaluation sets."""

    names: tuple[str, ...]
    hashes: Hashes
    sets: UInt64[np.ndarray, " N"]  # the set of each image
    indices: UInt64[np.ndarray, " N"]  # the index of each image in its set
    distance: int  # maximum number of differing bits

    def matches(self, image_hash: Hash) -> list[tuple[str, int, int]]:
        """Return set, index and number of differing bits of the images that one is near, nearest
        first. All are compared, at a few nanoseconds each."""
        differ = near.distances(self.hashes, image_hash)
        rows = np.flatnonzero(differ <= self.distance)
        return [
            (self.names[int(self.sets[row])], int(self.indices[row]), int(differ[row]))
            for row in rows[np.argsort(differ[rows], kind="stable")]
        ]
