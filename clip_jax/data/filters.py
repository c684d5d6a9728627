"""Which pairs `clip-jax prepare` keeps: by size, shape, caption and score, and no image twice."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, UInt64
from PIL import Image

from clip_jax.data.images import ImageError, decode
from clip_jax.data.sources import SampleError, ScoredSource, StoredSource


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """What a pair must be like; what cannot be read is always dropped."""

    min_side: int = 1  # pixels of the shorter side
    max_aspect: float = 100.0  # longer side / shorter side
    min_caption: int = 1  # characters; of several captions those outside are dropped
    max_caption: int = 100_000  # characters
    score_column: str = ""  # numbers in Parquet, in save_to_disk, or in img2dataset's beside tars
    min_score: float = -math.inf  # a pair without a score is dropped
    max_score: float = math.inf
    drop_duplicates: bool = False  # of images with the same bytes the first; reads the source twice

    def __post_init__(self) -> None:
        for low, high in (("min_caption", "max_caption"), ("min_score", "max_score")):
            if getattr(self, low) > getattr(self, high):
                given = f"{low}={getattr(self, low)} and {high}={getattr(self, high)}"
                raise ValueError(f"{given} leave nothing; the first must not be above the second")
        if not self.score_column and (self.min_score, self.max_score) != (-math.inf, math.inf):
            raise ValueError("min_score and max_score need score_column, which says what is meant")


class Filter:
    """Reads the pairs of a source that pass; the reason of others is a SampleError.

    The part of a reason before the colon is what a report counts by.
    """

    def __init__(self, config: FilterConfig, source: StoredSource) -> None:
        self._config, self._source = config, source
        self._scores = None
        if config.score_column:
            if not isinstance(source, ScoredSource):
                raise ValueError(
                    f"score_column={config.score_column!r}: {type(source).__name__} has no columns "
                    "beside its pairs; Parquet, save_to_disk and img2dataset's tars have"
                )
            self._scores = source.scores(config.score_column)
        self._repeated: Bool[np.ndarray, " N"] | None = None

    def leave_out(self, repeated: Bool[np.ndarray, " N"]) -> None:
        """Drop these from now on."""
        self._repeated = repeated

    def captions(self, index: int) -> list[str]:
        """Captions of a pair that passes all that can be said without decoding its image."""
        config = self._config
        if self._scores is not None:
            score = float(self._scores[index])
            if math.isnan(score):
                raise SampleError(f"score is missing: no {config.score_column}")
            if not config.min_score <= score <= config.max_score:
                raise SampleError(f"score: {config.score_column} {score:.4g}")
        if self._repeated is not None and self._repeated[index]:
            raise SampleError("duplicate image: an earlier one has the same bytes")
        captions = self._source.captions(index)
        lengths = [len(caption.strip()) for caption in captions]
        kept = [
            caption
            for caption, length in zip(captions, lengths, strict=True)
            if config.min_caption <= length <= config.max_caption
        ]
        if not kept:
            raise SampleError(f"caption length: {', '.join(map(str, lengths))} characters")
        return kept

    def read(self, index: int) -> tuple[bytes, Image.Image, list[str]]:
        """Encoded and decoded image and captions of a pair that passes."""
        captions = self.captions(index)
        image = self._source.image(index)
        try:
            picture = decode(image)
        except ImageError as error:
            raise SampleError(str(error)) from error
        short, long = sorted(picture.size)
        if short < self._config.min_side:
            raise SampleError(f"image side: {short} pixels")
        if long > self._config.max_aspect * short:
            raise SampleError(f"image aspect: {picture.width} x {picture.height}")
        return image, picture, captions

    def hashes(self, indices: Iterable[int]) -> UInt64[np.ndarray, " n"]:
        """Hash each image's bytes; 0 where the pair is dropped anyway.

        All else that decides follows from the bytes, so that of equal images the first that could
        be kept is the first with that hash. Two of 400 million share one by chance at odds of 230.
        """
        found = []
        for index in indices:
            try:
                self.captions(index)
                digest = hashlib.blake2b(self._source.image(index), digest_size=8).digest()
            except SampleError:
                found.append(0)
            else:
                found.append(int.from_bytes(digest) or 1)
        return np.array(found, np.uint64)


def repeated(hashes: UInt64[np.ndarray, " N"]) -> Bool[np.ndarray, " N"]:
    """Mark each hash but 0 that an earlier one equals."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    marks = np.zeros(len(hashes), np.bool_)
    marks[order[1:]] = (ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)
    return marks
