"""Images of a data set for the whole mesh: each process decodes its own part of every batch."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from clip_jax import sharding
from clip_jax.data.images import ImageError, Preprocess, read_ahead
from clip_jax.data.sources import SampleError
from clip_jax.evals.datasets import Data
from clip_jax.models.images import Images, num_bytes, write_row, zeros

# Images of a process at a time. Of 1,024, each new array of 150 MB cost 0.4 ms of a core an image,
# in pages, beside 2 ms of decoding.
_BATCH = 128


@dataclass(frozen=True)
class Share:
    """One process's rows of a batch. A row without an answer is zeros: padding, or unreadable."""

    images: Images
    answers: dict[int, Any]  # by position in the data set: a class, truths, captions
    skipped: dict[int, str]  # why


class Reader:
    """A data set's images in order, decoded in threads one batch ahead of need.

    All processes take the same number of batches; a global batch is a multiple of the mesh's
    batch shards, and its row `i` is the data set's image `start + i`.
    """

    def __init__(self, data: Data, preprocess: Preprocess, mesh: Mesh, count: int) -> None:
        """`count` is how many images are read, from the first."""
        self._data, self._preprocess, self.count = data, preprocess, count
        shards = sharding.batch_shards(mesh)
        self._part, parts = sharding.data_part(mesh)
        self._rows = -(-min(_BATCH * parts, count) // shards) * shards // parts  # of this process
        self._batch = self._rows * parts

    def __iter__(self) -> Iterator[Share]:
        firsts = (start + self._part * self._rows for start in range(0, self.count, self._batch))
        mine = (range(first, min(first + self._rows, self.count)) for first in firsts)
        return map(self._share, read_ahead(mine, self._read, ahead=1))

    def _read(self, index: int) -> tuple[int, Images | None, Any]:
        try:
            image, answer = self._data.load(index)
            return index, self._preprocess.batch(image), answer
        except (ImageError, SampleError) as error:
            return index, None, f"{self._data.key(index)}: {error}"

    def _share(self, rows: list[tuple[int, Images | None, Any]]) -> Share:
        share = Share(zeros(self._preprocess.image_spec, self._rows), {}, {})
        for row, (index, image, answer) in enumerate(rows):
            if image is None:
                share.skipped[index] = answer
            else:
                write_row(share.images, row, image)
                share.answers[index] = answer
        return share


class Kept:
    """Decoded images in host memory between evaluations: whole data sets, up to a budget."""

    def __init__(self, budget: int) -> None:
        """`budget` in bytes of this process."""
        self._free = budget
        self._known: dict[Any, list[Share]] = {}

    def read(self, key: Any, reader: Reader) -> Iterator[Share]:
        """Give what the reader reads, from memory where it was kept under this key."""
        if key in self._known:
            yield from self._known[key]
            return
        kept: list[Share] | None = []
        for share in reader:
            if kept is not None:
                kept.append(share)
                if len(kept) * num_bytes(share.images) > self._free:
                    kept = None
            yield share
        if kept:
            self._known[key] = kept
            self._free -= sum(num_bytes(share.images) for share in kept)
