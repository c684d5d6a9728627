"""Images of a data set for the whole mesh: each process decodes its own part of every batch."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from clip_jax import sharding
from clip_jax.data.images import ImageError, Preprocess
from clip_jax.data.sources import SampleError
from clip_jax.evals.datasets import Data

# Images of a process at a time. Of 1,024, each new array of 150 MB cost 0.4 ms of a core an image,
# in pages, beside 2 ms of decoding.
_BATCH = 128


@dataclass(frozen=True)
class Share:
    """One process's rows of a batch. A row without an answer is black: padding, or unreadable."""

    pixels: UInt8[np.ndarray, "B H W 3"]
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
        with ThreadPoolExecutor() as threads:
            ahead: list[list[Future]] = []
            for start in range(0, self.count, self._batch):
                first = start + self._part * self._rows
                mine = range(first, min(first + self._rows, self.count))
                ahead.append([threads.submit(self._read, index) for index in mine])
                if len(ahead) > 1:
                    yield self._share(ahead.pop(0))
            for rows in ahead:
                yield self._share(rows)

    def _read(self, index: int) -> tuple[int, np.ndarray | None, Any]:
        try:
            image, answer = self._data.load(index)
            return index, self._preprocess.pixels(image), answer
        except (ImageError, SampleError) as error:
            return index, None, f"{self._data.key(index)}: {error}"

    def _share(self, rows: list[Future]) -> Share:
        size = self._preprocess.image_size
        share = Share(np.zeros((self._rows, size, size, 3), np.uint8), {}, {})
        for row, future in enumerate(rows):
            index, pixels, answer = future.result()
            if pixels is None:
                share.skipped[index] = answer
            else:
                share.pixels[row] = pixels
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
                if len(kept) * share.pixels.nbytes > self._free:
                    kept = None
            yield share
        if kept:
            self._known[key] = kept
            self._free -= sum(share.pixels.nbytes for share in kept)
