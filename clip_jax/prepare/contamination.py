"""Training images near an evaluation's test images, to be taken out (the CLIP paper, section 5)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt64

from clip_jax.data.images import ImageError, decode
from clip_jax.data.sources import SampleError, StoredSource
from clip_jax.errors import InputError
from clip_jax.prepare import near
from clip_jax.prepare.near import Look, Looks
from clip_jax.storage import files

_BLOCK = 1 << 16  # test images compared at once


def named(sets: tuple[str, ...]) -> dict[str, str]:
    """Read `NAME=SOURCE`, or a source alone, which gives its own name. Raises InputError for a name
    twice."""
    found: dict[str, str] = {}
    for text in sets:
        name, equals, source = text.partition("=")
        if not equals:
            source = text
            path = files.place(text.rstrip("/"))
            name = path.parent.name if "*" in path.name or "{" in path.name else path.stem
        if not name or not source or name in found:
            raise InputError(
                f"decontaminate={text!r} is no set of its own; give NAME=SOURCE, each name once"
            )
        found[name] = source
    return found


def look_at(images: StoredSource, index: int) -> Look | None:
    """Hash a test image; None for a plain one and one that cannot be read."""
    try:
        return near.look(decode(images.image(index)))
    except (SampleError, ImageError):
        return None


@dataclass(frozen=True)
class EvaluationImages:
    """The hashes of all sets' test images."""

    names: tuple[str, ...]
    looks: Looks
    sets: UInt64[np.ndarray, " N"]  # of which set each is
    indices: UInt64[np.ndarray, " N"]  # and which image of it
    distance: int  # bits that may differ

    def matches(self, look: Look) -> list[tuple[str, int, int]]:
        """Sets and images in them that one looks like, and in how many bits it differs; nearest
        first. All are compared: it takes some nanoseconds each."""
        found = []
        for start in range(0, len(self.looks), _BLOCK):
            differ = near.distances(self.looks[start : start + _BLOCK], look)
            for place in np.flatnonzero(differ <= self.distance).tolist():
                at = start + place
                name = self.names[int(self.sets[at])]
                found.append((name, int(self.indices[at]), int(differ[place])))
        return sorted(found, key=lambda match: match[2])
