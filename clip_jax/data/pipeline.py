"""One endless order of samples, the same whatever the number of threads and processes.

A sample's position is its place in that order: batch t of B samples holds positions t·B to
(t+1)·B, process p of P the p-th contiguous part of it. Each epoch is a new permutation of the
source. Everything random in a sample comes from (seed, position), so the step number says all that
a resumed run needs to know.
"""

import contextlib
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32, Int64, UInt8

from clip_jax.data.augment import AugmentConfig, augment
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.images import ImageError, read_crop
from clip_jax.data.mixture import ENDLESS, MixtureConfig, MixtureSource
from clip_jax.data.sources import SampleError, Source
from clip_jax.data.sources.any import SingleConfig, open_single

_PIECE = (8, 64)  # samples, at least and at most, of which a batch is put together
_MAX_REPLACEMENTS = 1000  # tries for one position; beyond that the source is broken
_MIN_JUDGED = 256  # samples before the share of bad ones is judged
_SHOWN_REASONS = 3

Tokenize = Callable[[Sequence[str], int, bool], Int32[np.ndarray, "B L"]]


SourceConfig = SingleConfig | MixtureConfig


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pairs come from and how they are read."""

    source: SourceConfig = field(default_factory=DigitsConfig)
    seed: int = 0  # of the order, the crops and the choice of captions
    crop: Literal["random", "center"] = "random"  # which square of the resized image
    crop_scale: tuple[float, float] | None = None  # random ones: share of the area, not the paper's
    scaled_decode: bool = True  # JPEGs at 1/2, 1/4 or 1/8 where the crop keeps its size
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    workers: int = 0  # processes that read and decode, each with its threads; 0: none
    threads: int = 2  # that read and decode; 0: none, in the caller's thread
    prefetch: int = 2  # batches made ahead of need
    max_bad_share: float = 0.05  # of samples that cannot be read, before the run stops

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"data.seed={self.seed} must be from 0 to 2^32 - 1")
        if self.threads < 0:
            raise ValueError(f"data.threads={self.threads} must be at least 0")
        if self.workers < 0:
            raise ValueError(f"data.workers={self.workers} must be at least 0")
        if self.crop_scale and not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"data.crop_scale={self.crop_scale} must rise and lie in (0, 1]")
        if self.prefetch < 1:
            raise ValueError(f"data.prefetch={self.prefetch} must be at least 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError(f"data.max_bad_share={self.max_bad_share} must be from 0 to 1")


@dataclass(frozen=True)
class Batch:
    """This process's part of one global batch."""

    image: UInt8[np.ndarray, "B H W 3"]
    text: Int32[np.ndarray, "B L"]
    index: Int64[np.ndarray, " B"]  # global positions
    keys: list[str]  # of the samples used
    skipped: list[dict[str, Any]]  # position, key, reason of those that could not be


@dataclass(frozen=True)
class _Sample:
    image: UInt8[np.ndarray, "H W 3"]
    caption: str
    position: int
    key: str
    skipped: list[dict[str, Any]]


def build(
    config: DataConfig,
    *,
    tokenizer: Tokenize,
    image_size: int,
    context_length: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "Pipeline":
    """Open the source. `batch_size` is global; ValueError for what cannot be read or split."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size={batch_size} must be a positive multiple of the {process_count} processes"
        )
    return Pipeline(
        config,
        _Loader(config, image_size),
        functools.partial(_tokenized, tokenizer, context_length),
        batch_size=batch_size,
        part=(process_index, process_count),
    )


def _tokenized(
    tokenizer: Tokenize, context_length: int, texts: Sequence[str]
) -> Int32[np.ndarray, "B L"]:
    return tokenizer(texts, context_length, True)


def open_source(config: SourceConfig, image_size: int) -> Source:
    """Open what a source's config describes; sources that draw do so in `image_size` pixels."""
    if isinstance(config, MixtureConfig):
        members = [open_single(member.source, image_size) for member in config.members]
        return MixtureSource(config, members)
    return open_single(config, image_size)


class Pipeline:
    """Endless batches over one source, from any step on."""

    def __init__(
        self,
        config: DataConfig,
        loader: "_Loader",
        tokenize: Callable[[Sequence[str]], Int32[np.ndarray, "B L"]],
        *,
        batch_size: int,
        part: tuple[int, int],
    ) -> None:
        self._config, self._loader, self._tokenize = config, loader, tokenize
        self._batch_size, self._part = batch_size, part
        self.num_samples = len(loader.source)  # in one epoch

    def fingerprint(self) -> str:
        """Hash the source: how many samples it has, and the keys of a hundred, evenly spread."""
        count = self.num_samples
        indices = sorted({i * count // 100 for i in range(100)})
        named = [str(count), *(self._loader.source.key(i) for i in indices)] if count else ["0"]
        return hashlib.sha256("\n".join(named).encode("utf-8", "replace")).hexdigest()[:12]

    def batches(self, start_step: int = 0) -> Generator[Batch]:
        """Batch number `start_step` and all after it. Close the generator to end its threads.

        Raises ValueError once clearly more than `max_bad_share` of the samples were bad.
        """
        import grain

        config = self._config
        source = self._loader.source
        if isinstance(source, MixtureSource):
            order = source.order(config.seed)
        else:
            # Shuffled epoch by epoch, and before `repeat`: an epoch has each sample once.
            order = grain.MapDataset.range(self.num_samples).seed(config.seed).shuffle().repeat()
        own = self._batch_size // self._part[1]
        number = _num_pieces(own)
        make = _Pieces(self._loader, self._tokenize, order, self._batch_size, self._part, number)
        # A thread makes a piece of a batch, so that the first is soon there and few are in memory.
        ahead = config.prefetch * number
        stream = (
            grain.MapDataset.range(ENDLESS)
            .map(make)[start_step * number :]
            .to_iter_dataset(
                grain.ReadOptions(
                    num_threads=config.threads, prefetch_buffer_size=max(ahead, config.threads)
                )
            )
        )
        if config.workers:
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain's processes read flags, and we have none
                flags.FLAGS.mark_as_parsed()
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(
                    config.workers, per_worker_buffer_size=-(-ahead // config.workers)
                )
            )
        bad = _BadShare(config.max_bad_share)
        with contextlib.closing(iter(stream)) as pieces:
            while True:
                batch = _join(list(itertools.islice(pieces, number)))
                bad.judge(batch)
                yield batch


def _num_pieces(size: int) -> int:
    """In how many equal pieces of a few dozen samples a batch is made; one if there are none."""
    found = next(n for n in range(-(-size // _PIECE[1]), size + 1) if size % n == 0)
    return found if size // found >= _PIECE[0] else 1


@dataclass(frozen=True)
class _Told:
    """What a worker says of a piece besides its arrays, which come through shared memory."""

    index: Int64[np.ndarray, " B"]
    keys: list[str]
    skipped: list[dict[str, Any]]


_Piece = tuple[UInt8[np.ndarray, "B H W 3"], Int32[np.ndarray, "B L"], _Told]


@dataclass(frozen=True)
class _Pieces:
    """Makes the i-th of the pieces, `number` a batch, of which this process has a part."""

    load: "_Loader"
    tokenize: Callable[[Sequence[str]], Int32[np.ndarray, "B L"]]
    order: Any  # record of a position
    batch_size: int
    part: tuple[int, int]
    number: int

    def __call__(self, i: int) -> _Piece:
        step, piece = divmod(i, self.number)
        own = self.batch_size // self.part[1]
        size = own // self.number
        first = step * self.batch_size + self.part[0] * own + piece * size
        samples = [self.load(at, int(self.order[at])) for at in range(first, first + size)]
        told = _Told(
            index=np.array([sample.position for sample in samples], np.int64),
            keys=[sample.key for sample in samples],
            skipped=[event for sample in samples for event in sample.skipped],
        )
        texts = self.tokenize([sample.caption for sample in samples])
        return np.stack([sample.image for sample in samples]), texts, told


def _join(pieces: list[_Piece]) -> Batch:
    images, texts, told = zip(*pieces, strict=True)
    return Batch(
        image=np.concatenate(images),  # a copy, also of one piece: shared memory is given back
        text=np.concatenate(texts),
        index=np.concatenate([one.index for one in told]),
        keys=[key for one in told for key in one.keys],
        skipped=[event for one in told for event in one.skipped],
    )


class _Loader:
    """A sample of a position: the record that the order puts there, or the next good one."""

    def __init__(self, config: DataConfig, image_size: int) -> None:
        self.source = open_source(config.source, image_size)
        self._config, self._image_size = config, image_size

    def __reduce__(self) -> Any:
        # A worker opens the source itself: open files and mapped memory do not travel.
        return _Loader, (self._config, self._image_size)

    def __call__(self, position: int, record: int) -> _Sample:
        skipped = []
        count = len(self.source)
        for offset in range(min(count, _MAX_REPLACEMENTS)):
            candidate = (record + offset) % count
            # Each try draws the same numbers, however many the tries before it used.
            rng = np.random.Generator(np.random.Philox(key=[self._config.seed, position]))
            try:
                image, caption = self._load(candidate, rng)
            except SampleError as error:
                key = self.source.key(candidate)
                skipped.append({"position": position, "key": key, "reason": str(error)})
            else:
                return _Sample(image, caption, position, self.source.key(candidate), skipped)
        raise ValueError(
            f"{len(skipped)} samples in a row cannot be read, from {skipped[0]['key']!r} on: "
            f"{skipped[0]['reason']}. Repair the data or change data.source"
        )

    def _load(
        self, record: int, rng: np.random.Generator
    ) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        image, caption = self.source.load(record, rng)
        if not caption.strip():
            raise SampleError("caption is empty")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise SampleError(f"caption is not text: {error.reason} at {error.start}") from error
        config = self._config
        if isinstance(image, np.ndarray):
            return image, caption
        try:
            pixels = read_crop(
                image,
                self._image_size,
                rng if config.crop == "random" else None,
                config.crop_scale,
                scaled=config.scaled_decode,
            )
        except ImageError as error:
            raise SampleError(str(error)) from error
        return augment(pixels, rng, config.augment), caption


class _BadShare:
    """Counts bad samples and stops the run when they are too many."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._seen = self._bad = 0
        self._first: list[dict[str, Any]] = []

    def judge(self, batch: Batch) -> None:
        self._seen += len(batch.keys)
        self._bad += len({event["position"] for event in batch.skipped})
        self._first += batch.skipped[: _SHOWN_REASONS - len(self._first)]
        expected = self._limit * self._seen
        # Three standard deviations, since a share just below the limit strays above it by chance.
        if self._seen < _MIN_JUDGED or self._bad <= expected + 3 * math.sqrt(expected):
            return
        reasons = "; ".join(f"{event['key']}: {event['reason']}" for event in self._first)
        raise ValueError(
            f"{self._bad} of the first {self._seen} samples could not be read, more than "
            f"data.max_bad_share={self._limit:g}. The first: {reasons}. Repair the data, or raise "
            "data.max_bad_share to go on without them"
        )
