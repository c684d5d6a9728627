"""One endless order of samples, the same whatever the number of threads and processes.

A sample's position is its place in that order: batch t of B samples holds positions t·B to
(t+1)·B, process p of P the p-th contiguous part of it. Each epoch is a new permutation of the
source. Everything random in a sample comes from (seed, position), so the step number says all that
a resumed run needs to know.
"""

import contextlib
import functools
import itertools
import math
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Int32

from clip_jax.data import growth
from clip_jax.data.augment import AugmentConfig, augment
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.images import ImageError, read_crop
from clip_jax.data.order.batches import Batch, GlobalPieces, Sample, StreamPieces, join
from clip_jax.data.order.blocks import BlockOrder, OfPositions, StreamOrder, Streams
from clip_jax.data.order.mixture import ENDLESS, MixtureConfig, MixtureSource
from clip_jax.data.sources import AnyRecord, BlockSource, SampleError, Source, blocks_of, digest
from clip_jax.data.sources.any import SingleConfig, open_single
from clip_jax.errors import InputError, check_ranges
from clip_jax.models.images import Images, ImageSpec
from clip_jax.storage import files

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
    order: Literal["auto", "global", "blocks"] = "auto"  # blocks: many samples a request, of
    # files read from front to back; global: any sample next; auto: blocks in buckets
    shuffle_blocks: int = 1024  # size of the shuffle buffer of order=blocks, over all processes
    read_ahead_mib: int = 4096  # MiB of blocks that a process holds, read and not yet used

    def __post_init__(self) -> None:
        check_ranges(
            self, "data.",
            seed="[0, 4294967295]", threads="[0, inf)", workers="[0, inf)", crop_scale="(0, 1]",
            prefetch="[1, inf)", max_bad_share="[0, 1]", shuffle_blocks="[1, inf)",
            read_ahead_mib="[1, inf)",
        )  # fmt: skip
        if self.crop_scale and not self.crop_scale[0] <= self.crop_scale[1]:
            raise InputError(f"data.crop_scale={self.crop_scale} must rise")


def build(
    config: DataConfig,
    *,
    tokenizer: Tokenize,
    image_spec: ImageSpec,
    context_length: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
) -> "Pipeline":
    """Open the source. `batch_size` is global; raises InputError for what cannot be read or
    split."""
    if batch_size < 1 or batch_size % process_count:
        raise InputError(
            f"batch_size={batch_size} must be a positive multiple of the {process_count} processes"
        )
    return Pipeline(
        config,
        _Loader(config, image_spec, (process_index, process_count)),
        functools.partial(_tokenized, tokenizer, context_length),
        batch_size=batch_size,
        process=(process_index, process_count),
    )


def _tokenized(
    tokenizer: Tokenize, context_length: int, texts: Sequence[str]
) -> Int32[np.ndarray, "B L"]:
    return tokenizer(texts, context_length, True)


def open_source(config: SourceConfig, image_size: int, process: tuple[int, int] = (0, 1)) -> Source:
    """Open what a source's config describes; sources that draw do so in `image_size` pixels.

    `process` is which of several processes' this is: they share the building of an index.
    """
    if isinstance(config, MixtureConfig):
        members = [
            open_single(member.source, image_size, process, f"data.source.members[{i}].source")
            for i, member in enumerate(config.members)
        ]
        return MixtureSource(config, members)
    return open_single(config, image_size, process)


class Pipeline:
    """Endless batches over one source, from any step on."""

    def __init__(
        self,
        config: DataConfig,
        loader: "_Loader",
        tokenize: Callable[[Sequence[str]], Int32[np.ndarray, "B L"]],
        *,
        batch_size: int,
        process: tuple[int, int],
    ) -> None:
        self._config, self._loader, self._tokenize = config, loader, tokenize
        self._batch_size, self._process = batch_size, process
        self.num_samples = len(loader.source)  # in one epoch
        self.order = _settled_order(config, loader.source)
        if self.order == "blocks":
            Streams(batch_size, process)
            _check_budget(config, cast(BlockSource, loader.source), process[1])

    def fingerprints(self) -> list[str]:
        """Hash the source, of a mixture each member."""
        source = self._loader.source
        members = source.members if isinstance(source, MixtureSource) else [source]
        return [digest(one, blocks=self.order == "blocks") for one in members]

    def batches(self, start_step: int = 0, doubled_at: Sequence[int] = ()) -> Generator[Batch]:
        """Batch number `start_step` and all after it. Close the generator to end its threads.

        After the steps `doubled_at` a batch is twice as many of the first ones, joined: the order
        stays, and of several processes each has its rows of every one. Raises InputError once
        clearly more than `max_bad_share` of the samples were bad.
        """
        import grain

        config = self._config
        first = growth.samples_after(1, doubled_at, start_step)
        make = self._in_streams(first) if self.order == "blocks" else self._globally()
        number = make.number
        # A thread makes a piece of a batch, so that the first is soon there and few are in memory.
        ahead = config.prefetch * number << len(doubled_at)
        dataset = (
            grain.MapDataset.range(ENDLESS)
            .map(make)[first * number :]
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
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    config.workers, per_worker_buffer_size=-(-ahead // config.workers)
                ),
                worker_init_fn=_leave_interrupts,
            )
        bad = _BadShare(config.max_bad_share)
        with contextlib.closing(iter(dataset)) as pieces, contextlib.closing(make):
            for step in itertools.count(start_step):
                times = growth.batch_after(1, doubled_at, step)
                batch = join(list(itertools.islice(pieces, number * times)))
                bad.judge(batch)
                yield batch

    def _globally(self) -> GlobalPieces:
        import grain

        source, seed = self._loader.source, self._config.seed
        if isinstance(source, MixtureSource):
            order = source.order(seed)
        else:
            # Shuffled epoch by epoch, and before `repeat`: an epoch has each sample once.
            order = grain.MapDataset.range(self.num_samples).seed(seed).shuffle().repeat()
        return GlobalPieces(self._loader, self._tokenize, order, self._batch_size, self._process)

    def _in_streams(self, start_step: int) -> StreamPieces:
        config, streams = self._config, Streams(self._batch_size, self._process)
        return StreamPieces(
            self._loader,
            self._tokenize,
            functools.partial(_stream_order, config.seed, streams, config.shuffle_blocks),
            streams,
            workers=max(1, config.workers),
            start=start_step,
            budget=config.read_ahead_mib << 20,
        )


def _stream_order(seed: int, streams: Streams, shuffle_blocks: int, source: Source) -> StreamOrder:
    if isinstance(source, MixtureSource):
        return source.stream_order(seed, streams, shuffle_blocks)
    shares = OfPositions(streams, len(source))
    return BlockOrder(blocks_of(source), seed=seed, shuffle_blocks=shuffle_blocks, shares=shares)


def _settled_order(config: DataConfig, source: Source) -> Literal["global", "blocks"]:
    """The order that a run begins with. Raises InputError for blocks of a source that has
    none."""
    members = config.source.members if isinstance(config.source, MixtureConfig) else ()
    paths = [getattr(one, "path", "") for one in (config.source, *(m.source for m in members))]
    together = isinstance(source, BlockSource) and len(source.blocks()) < len(source)
    if config.order == "auto":
        return "blocks" if together and any(map(files.is_remote, paths)) else "global"
    if config.order == "blocks" and not together:
        raise InputError(
            "data.order=blocks needs files with many records in each: tars, Parquet, "
            "ArrayRecord. clip-jax prepare writes such files; data.order=global reads any"
        )
    return config.order


def _check_budget(config: DataConfig, source: BlockSource, processes: int) -> None:
    """Refuse a budget below the size of the shuffle buffer: reading would stop, or exceed it."""
    blocks, total = len(source.blocks()), source.size(0, len(source))
    buffer = min(config.shuffle_blocks, blocks)
    # Blocks in the buffer are half used, on average; a buffer of all begins with all.
    need = total / blocks * buffer / processes * (0.6 if buffer < blocks else 1.0)
    if need > config.read_ahead_mib << 20:
        raise InputError(
            f"data.read_ahead_mib={config.read_ahead_mib} is too little: of data.shuffle_blocks="
            f"{config.shuffle_blocks} blocks of {total / blocks / 2**20:.1f} MiB, each of "
            f"{processes} processes holds {need / 2**20:,.0f} MiB. Raise it, lower "
            "data.shuffle_blocks (a new run then shuffles less), or write the data anew with "
            "clip-jax prepare, in shorter blocks"
        )


class _Loader:
    """A sample of a position: the record that the order puts there, or the next good one."""

    def __init__(
        self, config: DataConfig, image_spec: ImageSpec, process: tuple[int, int] = (0, 1)
    ) -> None:
        self.source = open_source(config.source, image_spec.side, process)
        self._config, self._spec = config, image_spec

    def __reduce__(self) -> Any:
        # A worker opens the source itself: open files and mapped memory do not travel.
        return _Loader, (self._config, self._spec)

    def __call__(
        self, position: int, record: int, fetched: AnyRecord | SampleError | None = None
    ) -> Sample:
        """Load the record, unless it was `fetched` already, or the next good one."""
        skipped = []
        count = len(self.source)
        for offset in range(min(count, _MAX_REPLACEMENTS)):
            candidate = (record + offset) % count
            # Each try draws the same numbers, however many the tries before it used.
            rng = np.random.Generator(np.random.Philox(key=[self._config.seed, position]))
            here = None if offset else fetched
            key = here.key if isinstance(here, AnyRecord) else self.source.key(candidate)
            try:
                return Sample(*self._load(candidate, here, rng), position, key, skipped)
            except SampleError as error:
                skipped.append({"position": position, "key": key, "reason": str(error)})
        raise InputError(
            f"{len(skipped)} samples in a row cannot be read, from {skipped[0]['key']!r} on: "
            f"{skipped[0]['reason']}. Repair the data or change data.source"
        )

    def _load(
        self, record: int, fetched: AnyRecord | SampleError | None, rng: np.random.Generator
    ) -> tuple[Images, str]:
        if isinstance(fetched, SampleError):
            raise fetched
        image, caption = fetched.load(rng) if fetched else self.source.load(record, rng)
        if not caption.strip():
            raise SampleError("caption is empty")
        try:
            caption.encode()
        except UnicodeEncodeError as error:
            raise SampleError(f"caption is not text: {error.reason} at {error.start}") from error
        config = self._config
        if isinstance(image, np.ndarray):
            return self._spec.pack(image[None]), caption
        try:
            pixels = read_crop(
                image,
                self._spec,
                rng if config.crop == "random" else None,
                config.crop_scale,
                scaled=config.scaled_decode,
            )
        except ImageError as error:
            raise SampleError(str(error)) from error
        return self._spec.pack(augment(pixels, rng, config.augment)[None]), caption


def _leave_interrupts(*_: int) -> None:
    """Ignore Ctrl-C in a worker: a terminal sends it to all, and the training answers for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
        raise InputError(
            f"{self._bad} of the first {self._seen} samples could not be read, more than "
            f"data.max_bad_share={self._limit:g}. The first: {reasons}. Repair the data, or raise "
            "data.max_bad_share to go on without them"
        )
