"""Training images near an evaluation's test images, to be taken out (the CLIP paper, section 5)."""

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
    """Read `NAME=SOURCE`, or a source alone, which gives its own name. Raises InputError for a name
    twice."""
    by_name: dict[str, str] = {}
    for text in sets:
        name, equals, source = text.partition("=")
        if not equals:
            source = text
            path = files.as_path(text.rstrip("/"))
            name = path.parent.name if "*" in path.name or "{" in path.name else path.stem
        if not name or not source or name in by_name:
            raise InputError(
                f"decontaminate={text!r} is no set of its own; give NAME=SOURCE, each name once"
            )
        by_name[name] = source
    return by_name


def hash_image(images: StoredSource, index: int) -> Hash | None:
    """Hash a test image; None for a plain one and one that cannot be read."""
    try:
        return near.perceptual_hash(decode(images.image(index)))
    except (SampleError, ImageError):
        return None


@dataclass(frozen=True)
class EvaluationImages:
    """The hashes of all sets' test images."""

    names: tuple[str, ...]
    hashes: Hashes
    sets: UInt64[np.ndarray, " N"]  # of which set each is
    indices: UInt64[np.ndarray, " N"]  # and which image of it
    distance: int  # bits that may differ

    def matches(self, image_hash: Hash) -> list[tuple[str, int, int]]:
        """Sets and images in them that one is near, and in how many bits it differs; nearest
        first. All are compared: it takes some nanoseconds each."""
        differ = near.distances(self.hashes, image_hash)
        rows = np.flatnonzero(differ <= self.distance)
        return [
            (self.names[int(self.sets[row])], int(self.indices[row]), int(differ[row]))
            for row in rows[np.argsort(differ[rows], kind="stable")]
        ]
