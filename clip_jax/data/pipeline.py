"""Endless batches in one order of samples, whatever the number of threads and processes.

A sample's position is its index in that order: batch t of B samples holds positions t·B to
(t+1)·B, and process p of P reads the p-th contiguous part of it. Each epoch is a new permutation of
the source. Everything random in a sample comes from (seed, position), so a resumed run needs only
the step number.
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import math
import signal
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
from jaxtyping import Int32

from clip_jax.data import further, sources, turbo, views
from clip_jax.data.augment import AugmentConfig, augment, replay
from clip_jax.data.batch_plan import BatchKind, BatchPlan
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.images import Decoder, ImageError, fitted, read_crops
from clip_jax.data.order.batches import Batch, GlobalPieces, Sample, StreamPieces, Tokenizers, join
from clip_jax.data.order.blocks import BlockOrder, OfPositions, StreamOrder, Streams
from clip_jax.data.order.mixture import ENDLESS, MixtureConfig, MixtureSource
from clip_jax.data.reinforced import Reinforcement
from clip_jax.data.sources.any import SingleConfig, open_single
from clip_jax.data.sources.shards import listed
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import InputError, check_ranges, renamed_fields
from clip_jax.models.images import ImageSpec
from clip_jax.models.inputs import (
    FurtherTexts,
    ImageInput,
    Input,
    LabelInput,
    StoredInput,
    TextInput,
)
from clip_jax.storage import files

_MAX_REPLACEMENTS = 1000  # attempts for one position; beyond that the source is broken
_MIN_JUDGED = 256  # samples to read before the share of bad ones is checked
_SHOWN_REASONS = 3
_FIRST = 8  # samples whose stored embeddings are compared with the objective before training

Tokenize = Callable[[Sequence[str], int, bool], Int32[np.ndarray, "B L"]]


AnySourceConfig = SingleConfig | MixtureConfig


@renamed_fields("0.3.0", window="shuffle_blocks")
@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings of the input pipeline: the source of the pairs, and how they are read."""

    source: AnySourceConfig = field(default_factory=DigitsConfig)
    seed: int = 0  # Random seed for the order of samples, the crops and the choice of captions.
    # Position of the crop in the image. "stored": an augmentation that `clip-jax prepare
    # --reinforce` stored with the image, with its embeddings.
    crop: Literal["random", "center", "stored"] = "random"
    # Smallest and largest share of the image's area in a random crop, such as 0.9 1.0 (open_clip).
    # None: resize the shorter side, then crop a random square (CLIP paper).
    crop_scale: tuple[float, float] | None = None
    synthetic_ratio: float = 0.0  # Probability that a synthetic caption replaces the true one.
    scaled_decode: bool = True  # Decode JPEGs at 1/2, 1/4 or 1/8 if the crop stays large enough.
    # What decodes and resizes images. "turbo" (an extra) takes less time; its pixels differ from
    # Pillow's by at most 2 of 255 levels, in less than 1% of a photograph's values.
    decoder: Decoder = "pillow"
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    workers: int = 0  # Processes that read and decode, each with `threads` threads; 0: none.
    threads: int = 2  # Threads that read and decode in each process; 0: the main thread does it.
    prefetch: int = 2  # Number of batches prepared ahead.
    max_bad_share: float = 0.05  # Share of unreadable samples, 0 to 1, above which the run stops.
    # "global": any sample may be next. "blocks": files are read from front to back, many samples in
    # one request. "auto": blocks for files in buckets, else global.
    order: Literal["auto", "global", "blocks"] = "auto"
    shuffle_blocks: int = 1024  # Shuffle buffer of order="blocks", in blocks over all processes.
    read_ahead_mib: int = 4096  # Memory for blocks that are read ahead, in MiB for each process.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "data.",
            seed="[0, 4294967295]",
            threads="[0, inf)",
            workers="[0, inf)",
            crop_scale="(0, 1]",
            prefetch="[1, inf)",
            max_bad_share="[0, 1]",
            shuffle_blocks="[1, inf)",
            read_ahead_mib="[1, inf)",
            synthetic_ratio="[0, 1]",
        )
        if self.crop_scale and not self.crop_scale[0] <= self.crop_scale[1]:
            raise InputError(
                f"data.crop_scale={self.crop_scale} must be in ascending order; exchange the two"
            )
        if self.decoder == "turbo" and self.crop == "stored":
            raise InputError(
                "data.decoder=turbo does not read stored augmentations, whose embeddings belong to "
                "Pillow's pixels; set --data.decoder pillow"
            )


def build(
    config: DataConfig,
    plan: BatchPlan,
    *,
    tokenizer: Tokenize,
    context_length: int,
    process: tuple[int, int] = (0, 1),
    inputs: Mapping[str, Input] | None = None,
    of_kinds: Mapping[BatchKind, Mapping[str, Input]] | None = None,
) -> "Pipeline":
    """Open the source and build the pipeline of the plan's batches, which are global.

    `process` is (index, count) of this process. `inputs` are made of each sample besides its image
    and text; stored embeddings by the name `image` or `text` replace these. If only some kinds of
    batches have views (`ViewInput` and `MaskInput`), `of_kinds` has the inputs of each. Raises
    InputError if the source cannot be read or lacks an input, or a batch not be divided among the
    processes.
    """
    _, processes = process
    if plan.unit < 1 or plan.unit % processes:
        sizes = f"batch_size={plan.unit}"
        if len(plan.kinds) > 1:
            sizes = f"{plan.unit}, the greatest common divisor of all batch sizes,"
        raise InputError(
            f"{sizes} must be a positive multiple of the {processes} processes; change --batch-size"
        )
    side = max(kind.images.side for kind in plan.kinds)
    of_kinds = of_kinds or dict.fromkeys(plan.kinds, inputs or {})
    loader = _Loader(config, side, process, inputs, of_kinds)
    for source, (name, x) in itertools.product(loader.members, loader.stored.items()):
        _check_stored(cast(sources.StoredSource, source), x, replaces=name in ("image", "text"))
    tokenizers = {}
    if "text" not in loader.stored:
        tokenizers["text"] = functools.partial(_tokenized, tokenizer, context_length)
    for name, x in loader.texts.items():
        of_input = make_tokenizer(x.text), x.text.context_length
        tokenizers[name] = functools.partial(_tokenized, *of_input)
    for name, x in loader.further.items():
        of_input = make_tokenizer(x.text), x.text.context_length
        tokenizers[name] = functools.partial(_tokenized_each, *of_input)
    return Pipeline(config, loader, tokenizers, plan=plan, process=process)


def _tokenized(
    tokenizer: Tokenize, context_length: int, texts: Sequence[str]
) -> Int32[np.ndarray, "B L"]:
    return tokenizer(texts, context_length, True)


def _tokenized_each(
    tokenizer: Tokenize, context_length: int, texts: Sequence[Sequence[str]]
) -> Int32[np.ndarray, "B T L"]:
    """Tokenize as many texts of each sample."""
    rows = tokenizer([text for several in texts for text in several], context_length, True)
    return rows.reshape(len(texts), -1, context_length)


def open_source(
    config: AnySourceConfig, image_size: int, process: tuple[int, int] = (0, 1)
) -> sources.Source:
    """Open the source that a config describes; a source that draws does so at `image_size` pixels.

    `process` is (index, count) of this process: all processes share the building of an index.
    """
    if isinstance(config, MixtureConfig):
        members = [
            open_single(member.source, image_size, process, f"data.source.members[{i}].source")
            for i, member in enumerate(config.members)
        ]
        return MixtureSource(config, members)
    return open_single(config, image_size, process)


class Pipeline:
    """Endless batches from one source, starting at any step."""

    def __init__(
        self,
        config: DataConfig,
        loader: "_Loader",
        tokenizers: Tokenizers,
        *,
        plan: BatchPlan,
        process: tuple[int, int],
    ) -> None:
        self._config = config
        self._loader = loader
        self._tokenizers = tokenizers
        self._plan = plan
        self._process = process
        self.num_samples = len(loader.source)  # in one epoch
        self.order = _settled_order(config, loader.source)
        if self.order == "blocks":
            Streams(plan.unit, process)
            _check_budget(config, cast(sources.BlockSource, loader.source), process[1])

    def fingerprints(self) -> list[str]:
        """Hash the source, or each member of a mixture, with the first stored embeddings."""
        members = self._loader.members
        hashes = [sources.digest(member, blocks=self.order == "blocks") for member in members]
        if not (self._loader.reads_stored or self._loader.stored):
            return hashes
        fingerprints = []
        for member, digest in zip(members, hashes, strict=True):
            embeddings = _reinforcement(cast(sources.StoredSource, member), 0)
            rows = embeddings.image if embeddings.image.size else embeddings.text
            stored = hashlib.sha256(rows.tobytes()).hexdigest()[:12]
            fingerprints.append(f"{digest}-{stored}")
        return fingerprints

    def batches(self, start_step: int = 0) -> Generator[Batch]:
        """Yield batch `start_step` and all that follow. Close the generator to stop its threads.

        A batch joins one or more units of the plan, in the order of the data. Raises InputError
        once clearly more than `max_bad_share` of the samples were bad.
        """
        import grain

        config, plan = self._config, self._plan
        first = plan.units_before(start_step)
        make = self._in_streams(first) if self.order == "blocks" else self._globally()
        number = make.number
        # A thread makes a piece of a batch: the first batch is ready sooner, and few are in memory.
        ahead = config.prefetch * number * max(kind.pairs for kind in plan.kinds) // plan.unit
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

            if not flags.FLAGS.is_parsed():  # Grain's workers expect parsed absl flags
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
                times = plan.at(step).pairs // plan.unit
                taken = list(itertools.islice(pieces, number * times))
                batch = join(taken, plan.samples_after(step))
                bad.judge(batch)
                yield batch

    def _globally(self) -> GlobalPieces:
        import grain

        source, seed = self._loader.source, self._config.seed
        if isinstance(source, MixtureSource):
            order = source.order(seed)
        else:
            # Shuffled before `repeat`, so that each epoch has every sample exactly once.
            order = grain.MapDataset.range(self.num_samples).seed(seed).shuffle().repeat()
        return GlobalPieces(self._loader, self._tokenizers, order, self._plan, self._process)

    def _in_streams(self, start: int) -> StreamPieces:
        config, streams = self._config, Streams(self._plan.unit, self._process)
        return StreamPieces(
            self._loader,
            self._tokenizers,
            functools.partial(_stream_order, config.seed, streams, config.shuffle_blocks),
            streams,
            self._plan,
            workers=max(1, config.workers),
            start=start,
            budget=config.read_ahead_mib << 20,
        )


def _stream_order(
    seed: int, streams: Streams, shuffle_blocks: int, source: sources.Source
) -> StreamOrder:
    if isinstance(source, MixtureSource):
        return source.stream_order(seed, streams, shuffle_blocks)
    shares = OfPositions(streams, len(source))
    return BlockOrder(
        sources.blocks_of(source), seed=seed, shuffle_blocks=shuffle_blocks, shares=shares
    )


def _settled_order(config: DataConfig, source: sources.Source) -> Literal["global", "blocks"]:
    """Resolve `data.order`. Raises InputError if blocks are required and the source has none."""
    configs = [config.source]
    if isinstance(config.source, MixtureConfig):
        configs = [member.source for member in config.source.members]
    is_remote = any(files.is_remote(getattr(part, "path", "")) for part in configs)
    together = isinstance(source, sources.BlockSource) and len(source.blocks()) < len(source)
    if config.order == "auto":
        return "blocks" if together and is_remote else "global"
    if config.order == "blocks" and not together:
        raise InputError(
            "data.order=blocks needs files with many records each: tars, Parquet or "
            "ArrayRecord. Set --data.order global, or convert the data with clip-jax prepare"
        )
    return config.order


def _check_budget(config: DataConfig, source: sources.BlockSource, processes: int) -> None:
    """Raise InputError if the shuffle buffer exceeds the memory for reading ahead."""
    blocks = len(source.blocks())
    total = source.size(0, len(source))
    buffer = min(config.shuffle_blocks, blocks)
    # On average, half of each buffered block is used; a buffer of all blocks starts full.
    need = total / blocks * buffer / processes * (0.6 if buffer < blocks else 1.0)
    if need > config.read_ahead_mib << 20:
        raise InputError(
            f"data.read_ahead_mib={config.read_ahead_mib} is too small: a shuffle buffer of "
            f"data.shuffle_blocks={config.shuffle_blocks} blocks of {total / blocks / 2**20:.1f} "
            f"MiB needs {need / 2**20:,.0f} MiB on each of {processes} processes. Raise "
            "--data.read-ahead-mib, lower --data.shuffle-blocks in a new run (it shuffles less), "
            "or write shorter blocks with clip-jax prepare"
        )


class _Loader:
    """Loads the sample of a position: its record in the order, or the next good one."""

    def __init__(
        self,
        config: DataConfig,
        side: int,
        process: tuple[int, int] = (0, 1),
        inputs: Mapping[str, Input] | None = None,
        of_kinds: Mapping[BatchKind, Mapping[str, Input]] | None = None,
    ) -> None:
        if config.decoder == "turbo":
            turbo.check_installed()
        source = self.source = open_source(config.source, side, process)
        self.members = source.members if isinstance(source, MixtureSource) else [source]
        self._config, self._side, self._inputs = config, side, inputs or {}
        each = self._inputs.items()
        self._specs = {name: x.spec for name, x in each if isinstance(x, ImageInput)}
        self.texts = {name: x for name, x in each if isinstance(x, TextInput)}
        self.further = {name: x for name, x in each if isinstance(x, FurtherTexts)}
        self.stored = {name: x for name, x in each if isinstance(x, StoredInput)}
        self._labels = {name: x for name, x in each if isinstance(x, LabelInput)}
        self._of_kinds = of_kinds or {}
        self.reads_stored = config.crop == "stored"
        needs_synthetic = any(x.is_synthetic for x in self._inputs.values())
        self._reads_synthetic = needs_synthetic or config.synthetic_ratio > 0
        for x in self._labels.values():
            classes_of(self.source, x.classes)  # raises InputError
        self._reads_more = self.reads_stored or self._reads_synthetic or bool(self._labels)
        self._reads_more |= bool(self.stored) or bool(self.further)
        if any(x.of == "image" for x in self.stored.values()) and not self.reads_stored:
            raise InputError(
                "stored embeddings of images belong to the crops that are stored with them, and "
                f"data.crop is {config.crop}: set --data.crop stored, with data that clip-jax "
                "prepare --reinforce wrote"
            )
        is_stored = [isinstance(member, sources.StoredSource) for member in self.members]
        if self.further and not all(is_stored):
            raise InputError(
                "several texts of an image need a source whose captions are stored, and the "
                "bundled digits draw theirs: set --data.source, or captions=true in the objective"
            )
        if self._reads_more and not all(is_stored):
            raise InputError(
                "synthetic captions and stored augmentations need data that clip-jax prepare "
                "wrote; set --data.source to such a path"
            )

    def __reduce__(self) -> Any:
        # Workers reopen the source: open files and mapped memory cannot be pickled.
        return _Loader, (self._config, self._side, (0, 1), self._inputs, self._of_kinds)

    def __call__(
        self,
        position: int,
        record: int,
        kind: BatchKind,
        fetched: sources.AnyRecord | sources.SampleError | None = None,
    ) -> Sample:
        """Load the record, unless it was `fetched` already; if it is bad, the next good one."""
        skipped = []
        count = len(self.source)
        for offset in range(min(count, _MAX_REPLACEMENTS)):
            candidate = (record + offset) % count
            # Each attempt draws the same random numbers, however many earlier ones used.
            rng = np.random.Generator(np.random.Philox(key=[self._config.seed, position]))
            here = None if offset else fetched
            key = here.key if isinstance(here, sources.AnyRecord) else self.source.key(candidate)
            try:
                loaded = self._load(candidate, kind, here, rng, position)
                return Sample(*loaded, position, key, skipped)
            except sources.SampleError as error:
                skipped.append({"position": position, "key": key, "reason": str(error)})
        raise InputError(
            f"{len(skipped)} samples in a row cannot be read, from {skipped[0]['key']!r} on: "
            f"{skipped[0]['reason']}. Repair the data, or choose another data.source"
        )

    def _load(
        self,
        record: int,
        kind: BatchKind,
        fetched: sources.AnyRecord | sources.SampleError | None,
        rng: np.random.Generator,
        position: int,
    ) -> tuple[dict[str, Any], dict[str, str | list[str]]]:
        if isinstance(fetched, sources.SampleError):
            raise fetched
        more, arrays = None, {}
        several: list[str] = []
        if self._reads_more:
            is_stored = isinstance(fetched, sources.StoredRecord)
            item = fetched if is_stored else cast(sources.StoredSource, self.source).record(record)
            more = item.more() or Reinforcement()
            image = b"" if "image" in self.stored else item.image()
            several = item.captions()
            caption, synthetic, arrays = self._drawn(several, more, rng)
            several = [*several, *more.synthetic]
            arrays |= {name: np.array([item.label], np.int32) for name in self._labels}
        else:
            image, caption = fetched.load(rng) if fetched else self.source.load(record, rng)
            synthetic = caption
        for text in (caption, synthetic):
            if not text.strip():
                raise sources.SampleError("caption is empty")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise sources.SampleError(
                    f"caption is not text: {error.reason} at {error.start}"
                ) from error
        captions: dict[str, str | list[str]] = {"text": caption}
        captions |= {name: synthetic if x.synthetic else caption for name, x in self.texts.items()}
        for name, x in self.further.items():
            # Numbers of their own, so that the image is that of a run without further texts.
            numbers = np.random.Philox(key=[self._config.seed, position]).jumped()
            texts = further.draw(x, caption, several, np.random.Generator(numbers))
            arrays[x.counter(name)] = np.array([len(texts)], np.int32)
            captions[name] = texts + [caption] * (x.count - len(texts))
        specs = ({} if "image" in self.stored else {"image": kind.images}) | self._specs
        distinct = list(dict.fromkeys(specs.values()))
        number = arrays.pop("number", 0)
        how = {"scaled": self._config.scaled_decode, "decoder": self._config.decoder}
        try:
            crops = self._crops(image, distinct, more, number, rng) if distinct else []
            key = (self._config.seed, position)
            arrays |= views.draw(image, self._of_kinds.get(kind, {}), key, **how)
        except ImageError as error:
            raise sources.SampleError(str(error)) from error
        packed = {shape: shape.pack(x[None]) for shape, x in zip(distinct, crops, strict=True)}
        images = {name: packed[shape] for name, shape in specs.items()}
        return images | arrays, captions

    def _crops(
        self,
        image: Any,
        specs: Sequence[ImageSpec],
        more: Reinforcement | None,
        number: int,
        rng: np.random.Generator,
    ) -> list[np.ndarray]:
        """Return the image at each resolution, cropped and augmented alike."""
        config = self._config
        if isinstance(image, np.ndarray):
            return [fitted(image, spec) for spec in specs]
        if more is not None and self.reads_stored:
            return replay(image, more.augmentations[number], specs, more.size)
        crop_rng = rng if config.crop == "random" else None
        views = read_crops(
            image,
            specs,
            crop_rng,
            config.crop_scale,
            scaled=config.scaled_decode,
            decoder=config.decoder,
        )
        # Each draws the same numbers.
        rngs = [rng, *(copy.deepcopy(rng) for _ in views[1:])]
        side = specs[0].side
        return [augment(x, y, config.augment, side) for x, y in zip(views, rngs, strict=True)]

    def _drawn(
        self, captions: list[str], more: Reinforcement, rng: np.random.Generator
    ) -> tuple[str, str, dict[str, Any]]:
        """Draw a caption, a synthetic one and an augmentation; return the captions, and the stored
        embeddings of all three by the names of the inputs."""
        i = _one_of(captions, rng, "caption")
        caption = synthetic = captions[i]
        chosen = {"text": (more.text, i)}
        arrays: dict[str, Any] = {}
        if self._reads_synthetic:
            j = _one_of(more.synthetic, rng, "synthetic caption")
            synthetic = more.synthetic[j]
            chosen["synthetic"] = more.synthetic_text, j
            if rng.random() < self._config.synthetic_ratio:
                caption = synthetic
                chosen["text"] = chosen["synthetic"]
        if self.reads_stored:
            arrays["number"] = _one_of(more.augmentations, rng, "stored augmentation")
            chosen["image"] = more.image, arrays["number"]
        for name, x in self.stored.items():
            rows, row = chosen[x.of]
            arrays[name] = rows[row : row + 1]
            more.check(arrays[name], x)
        return caption, synthetic, arrays


def _check_stored(source: sources.StoredSource, x: StoredInput, *, replaces: bool) -> None:
    """Raise InputError if a source stores other embeddings than those of a term's teachers, or of
    the tower that they replace.

    The first samples decide together: one that differs from all others is a bad sample.
    """
    problems = {}
    for index in range(min(_FIRST, len(source))):
        more = _reinforcement(source, index)
        problem = more.misfit(x)
        if not problem:
            return
        if more.total:
            problems[source.key(index)] = problem
    advice = (
        "set one StoredTeacher with its embed_dim for each teacher in report.json of the data, in "
        "the same order"
    )
    if replaces:
        advice = (
            f"set init_from to the {x.of} tower that clip-jax prepare --reinforce embedded the "
            "data with, alone, or embed the data with this one"
        )
    for key, problem in problems.items():
        raise InputError(
            f"data.source stores {x.of} embeddings with {problem} (sample {key!r}): {advice}"
        )


def _reinforcement(source: sources.StoredSource, index: int) -> Reinforcement:
    """Return what is stored with a sample, nothing for a sample that cannot be read."""
    with contextlib.suppress(sources.SampleError):
        return source.record(index).more() or Reinforcement()
    return Reinforcement()


def classes_of(source: Any, expected: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return a source's classes. Raises InputError if it has none, only one, for which losses are
    constant, or others than expected."""
    classes = getattr(source, "classes", ())
    if not classes or expected not in ((), classes):
        raise InputError(
            f"the objective needs labels of {listed(expected) or 'classes'}, but data.source has "
            f"{listed(classes) or 'none'}: set it to class folders, with --data.source.templates"
        )
    if len(classes) < 2:
        raise InputError(
            f"data.source has one class, {listed(classes)}, so that a loss of classes is constant: "
            "set it to at least two class folders, or remove the classifier or mask_same_class"
        )
    return classes


def _one_of(values: Sequence[Any], rng: np.random.Generator, what: str) -> int:
    """Draw an index; a single value draws nothing, as in `caption_of`."""
    if not values:
        raise sources.SampleError(f"{what} is missing")
    return 0 if len(values) == 1 else int(rng.integers(len(values)))


def _leave_interrupts(*_: int) -> None:
    """Ignore Ctrl-C in a worker: the terminal sends it to all, and the trainer handles it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _BadShare:
    """Counts bad samples and stops the run if there are too many."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._seen = self._bad = 0
        self._first: list[dict[str, Any]] = []

    def judge(self, batch: Batch) -> None:
        self._seen += len(batch.keys)
        self._bad += len({event["position"] for event in batch.skipped})
        self._first += batch.skipped[: _SHOWN_REASONS - len(self._first)]
        expected = self._limit * self._seen
        # Three standard deviations, since a share just below the limit may exceed it by chance.
        if self._seen < _MIN_JUDGED or self._bad <= expected + 3 * math.sqrt(expected):
            return
        reasons = "; ".join(f"{event['key']}: {event['reason']}" for event in self._first)
        raise InputError(
            f"{self._bad} of the first {self._seen} samples could not be read, more than "
            f"data.max_bad_share={self._limit:g}. The first: {reasons}. Repair the data, or raise "
            "--data.max-bad-share to continue without them"
        )
