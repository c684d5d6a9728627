"""The stages of `clip-jax prepare`: functions of options and one task, with and without Ray."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import tarfile
from collections import deque
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clip_jax.data.images import read_ahead, size_of
from clip_jax.data.reinforced import Reinforcement, to_features
from clip_jax.data.sources import BlockSource, SampleError, StoredRecord, StoredSource
from clip_jax.data.sources.any import PathConfig, open_images, open_single
from clip_jax.data.sources.array_record import decode_example, encode_example
from clip_jax.engine import Counted
from clip_jax.errors import InputError
from clip_jax.inference.loading import Model, unit
from clip_jax.models.images import Images, concatenate
from clip_jax.prepare import buckets, contamination, near, reinforce
from clip_jax.prepare.contamination import EvaluationImages
from clip_jax.prepare.counts import COUNTED, Statistics
from clip_jax.prepare.filters import Contaminated, Filter, Pair
from clip_jax.prepare.layout import Group, Layout, PrepareConfig, statistics_of
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import content_of, parse

# Pairs that pass the filters.
ROWS: np.dtype = np.dtype([("index", "<u8"), ("order", "<u8"), ("score", "<f8")])
SAME = np.dtype([("hash", "<u8"), ("index", "<u8")])  # of images, hashed by their bytes
REPEATED: np.dtype = np.dtype([("index", "<u8"), ("of", "<u8")])  # index of an earlier one

CANDIDATE, DUPLICATE, NEAR, SCORE, NOT_TOP = 1, 2, 3, 4, 5  # verdicts; 0: dropped by a filter

# ------------------------------------------------------------------------------ read and filter


def open_source(config: PrepareConfig) -> StoredSource:
    """Open the source to prepare."""
    names = ("image_column", "caption_column", "bad_shards")
    how = {name: getattr(config, name) for name in names}
    source = open_single(PathConfig(path=config.source, **how), image_size=1, option="SOURCE")
    assert isinstance(source, StoredSource), config.source  # a source with a path never draws
    return source


@functools.lru_cache(maxsize=1)
def opened(config: PrepareConfig, layout: Layout) -> tuple[StoredSource, Filter]:
    """Open the source and its filter once for all tasks of a process."""
    source = open_source(config)
    evaluation = functools.cache(lambda: _evaluation(config, layout))
    return source, Filter(config, source, evaluation if config.decontaminate else None)


def _evaluation(config: PrepareConfig, layout: Layout) -> EvaluationImages:
    with np.load(io.BytesIO(files.read(layout.evaluation))) as arrays:
        return EvaluationImages(
            names=tuple(contamination.named(config.decontaminate)),
            hashes=arrays["hashes"],
            sets=arrays["sets"],
            indices=arrays["indices"],
            distance=config.near_distance,
        )


def hash_evaluation_set(source: str, target: tuple[range, AnyPath], counted: Counted) -> None:
    """Hash a range of the images of an evaluation set."""
    indices, path = target
    images = open_images(source, option="--decontaminate")
    rows = []
    for index in counted(indices):
        image_hash = contamination.hash_image(images, index)
        if image_hash is not None:
            rows.append((index, image_hash))
    buckets.write_one(path, np.array(rows, near.ROW).tobytes())


def read(config: PrepareConfig, layout: Layout, number: int, counted: Counted) -> None:
    """Read samples once, and write what later stages need of those that pass.

    That is the pairs, in the order in which they will be read, and the keys that compare them.
    """
    statistics = Statistics(config.list_dropped)
    rows = []
    same = []
    alike = []
    pairs: list[list[bytes]] = [[] for _ in range(layout.pair_buckets)]
    for index, pair in _passing(config, layout, number, counted, statistics):
        order = _order(config, layout, index, pair.key)
        rows.append((index, order, pair.score))
        bucket = int(buckets.number_of(np.array([order], np.uint64), layout.pair_buckets)[0])
        pairs[bucket].append(buckets.frame(order, index, _record(pair, config)))
        if config.drop_duplicates:
            digest = hashlib.blake2b(pair.image, digest_size=8).digest()
            same.append((int.from_bytes(digest), index))
        if pair.image_hash is not None:
            alike.append((index, pair.image_hash))
    buckets.write(layout.file(number, "pairs"), [b"".join(bucket) for bucket in pairs])
    buckets.write_one(layout.file(number, "rows"), np.array(rows, ROWS).tobytes())
    count = layout.join_buckets
    if config.drop_duplicates:
        table = np.array(same, SAME)
        numbers = buckets.number_of(np.array([digest for digest, _ in same], np.uint64), count)
        parts = [table[numbers == bucket].tobytes() for bucket in range(count)]
        buckets.write(layout.file(number, "same"), parts)
    if config.drop_near_duplicates:
        parts = near.sorted_in(np.array(alike, near.ROW), near.band_bits(layout.samples), count)
        buckets.write(layout.file(number, "alike"), parts)
    files.write_whole(layout.file(number, "read"), json.dumps(statistics.to_dict()))


def copy(config: PrepareConfig, layout: Layout, number: int, counted: Counted) -> str:
    """Read samples and write those that pass as a shard, where no pair depends on another."""
    statistics = Statistics(config.list_dropped)
    shard = layout.shard(number, layout.reads)
    files.remove_partial(shard)  # of a run that was killed

    def records() -> Iterator[bytes]:
        for _, pair in _passing(config, layout, number, counted, statistics):
            yield _kept(_record(pair, config), statistics)

    return _write_shard(config, shard, records(), statistics, len(layout.indices(number)))


def _passing(
    config: PrepareConfig, layout: Layout, number: int, counted: Counted, statistics: Statistics
) -> Iterator[tuple[int, Pair]]:
    source, passes = opened(config, layout)

    def read(item: tuple[int, StoredRecord | None]) -> tuple[Any, Pair | SampleError]:
        try:
            return item, passes.read(*item)
        except SampleError as error:
            return item, error

    fetched = _fetched(source, counted(layout.indices(number)))
    if config.has_models and not config.joins:  # else other tasks read in other threads
        results = read_ahead(reinforce.batches(fetched, config.batch_size), read)
    else:
        results = ([read(item)] for item in fetched)
    for (index, record), pair in itertools.chain.from_iterable(results):
        if isinstance(pair, Pair):
            yield index, pair
            continue
        statistics.drop(record.key if record else source.key(index), pair)
        if isinstance(pair, Contaminated):
            statistics.match(pair.matches)


def _fetched(
    source: StoredSource, indices: Iterator[int]
) -> Iterator[tuple[int, StoredRecord | None]]:
    """Read samples by blocks, if the source has any; records that are None are read singly."""
    ends = np.cumsum(source.blocks()) if isinstance(source, BlockSource) else None
    first = 0
    last = 0
    records: list[StoredRecord | None] = []
    for index in indices:
        if ends is None:
            yield index, None
            continue
        if not first <= index < last:
            first = index
            last = int(ends[np.searchsorted(ends, index, side="right")])
            try:
                records = cast(Any, source).fetch(first, last)
            except SampleError:  # each sample reports its own error
                records = [None] * (last - first)
        yield index, records[index - first]


def _order(config: PrepareConfig, layout: Layout, index: int, key: str) -> int:
    """Return the 64-bit sort key of a pair: a hash, or its index, scaled to the same range."""
    if not config.shuffle:
        return index * ((1 << 64) // layout.samples)
    seed = config.seed.to_bytes(8)
    digest = hashlib.blake2b(key.encode(errors="replace"), digest_size=8, key=seed).digest()
    return int.from_bytes(digest)


def _record(pair: Pair, config: PrepareConfig) -> bytes:
    texts = [caption.encode() for caption in pair.captions]
    image = _encoded(pair.image, pair.picture, config)
    more = pair.more
    if config.shards == "tar":
        texts = texts[:1]
    features = {"image": [image], "caption": texts, "key": [pair.key.encode(errors="replace")]}
    if more:
        more = _stored(pair, more, config, is_encoded=image is not pair.image)
        features |= to_features(more, config.embedding_type, more.widths)
    return encode_example(features)


def _stored(
    pair: Pair, more: Reinforcement, config: PrepareConfig, is_encoded: bool
) -> Reinforcement:
    """Return what is written of what a reinforced source stores with a pair.

    Raises InputError if embeddings are not those of the image and of the captions to be written.
    """
    if config.reinforce:  # which replaces everything but the captions
        return Reinforcement(synthetic=more.synthetic)
    again = "or add reinforce with the teachers, which computes all embeddings again."
    of_image = more.augmentations or more.image.size
    if config.captions and (of_image or more.text.size or more.synthetic_text.size):
        raise InputError(
            f"{pair.key} has augmentations or embeddings, but new captions would have no "
            f"embeddings; leave out captions, {again}"
        )
    if is_encoded and of_image:
        option = "shards=tar, which takes JPEG, PNG and WebP only,"
        if config.encode != "keep":
            option = f"encode={config.encode}"
        elif 0 < config.resize < min(pair.picture.size):
            option = f"resize={config.resize}"
        raise InputError(
            f"{pair.key} has augmentations or embeddings of its image as it is stored, but "
            f"{option} changes the image; leave that out, {again}"
        )
    if len(more.text) not in (0, len(pair.captions)):
        raise InputError(
            f"{pair.key} has embeddings of {len(more.text)} captions, of which the filters keep "
            f"{len(pair.captions)}; leave out min_caption, max_caption, min_words, languages and "
            f"filter, {again}"
        )
    written = 1 if config.shards == "tar" else len(pair.captions)
    return dataclasses.replace(more, text=more.text[:written])


def _encoded(image: bytes, picture: Image.Image, config: PrepareConfig) -> bytes:
    """Encode the image as it is to be stored."""
    if config.encode == "none":  # it is embedded as it is, and then left out
        return image
    short = min(picture.size)
    smaller = 0 < config.resize < short
    as_is = config.shards != "tar" or reinforce.suffix_of(image)
    if config.encode == "keep" and not smaller and as_is:
        return image
    if smaller:
        width, height = (max(1, round(side * config.resize / short)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "WEBP" if config.encode == "webp" else "JPEG", quality=config.quality)
    return file.getvalue()


# ----------------------------------------------------------------------------------- duplicates


def find_same(layout: Layout, bucket: int, counted: Counted) -> None:
    """Find the images of a bucket with the same bytes as an earlier one."""
    [bucket] = counted([bucket])
    table = np.sort(_gathered(layout, "same", bucket, SAME), order="index")
    _, firsts, which = np.unique(table["hash"], return_index=True, return_inverse=True)
    first = firsts[which]
    later = np.flatnonzero(first != np.arange(len(table)))
    pairs = zip(table["index"][later], table["index"][first[later]], strict=True)
    _write_repeated(layout.joined("same", bucket), list(pairs))


def find_alike(layout: Layout, distance: int, bucket: int, counted: Counted) -> None:
    """Find the images of a band's bucket that are near an earlier one."""
    [bucket] = counted([bucket])
    table = _gathered(layout, "alike", bucket, near.ROW)
    band = bucket // layout.join_buckets
    later, earlier = near.near_earlier(table, band, near.band_bits(layout.samples), distance)
    first: dict[int, int] = {}
    for index, of in zip(later.tolist(), earlier.tolist(), strict=True):
        first[index] = min(of, first.get(index, of))
    _write_repeated(layout.joined("alike", bucket), sorted(first.items()))


def _gathered(layout: Layout, kind: str, bucket: int, dtype: np.dtype) -> np.ndarray:
    paths = [layout.file(number, kind) for number in range(layout.reads)]
    return np.frombuffer(b"".join(buckets.read_all(paths, bucket, bucket + 1)), dtype)


def _write_repeated(path: AnyPath, pairs: list[Any]) -> None:
    buckets.write_one(path, np.sort(np.array(pairs, REPEATED), order="index").tobytes())


# --------------------------------------------------------------------------------------- scores


def score(config: PrepareConfig, layout: Layout, number: int, counted: Counted) -> None:
    """Compute the cosine of image and caption (or the mean over captions) of candidates."""
    assert config.score_with is not None
    model = reinforce.model(config.score_with)
    rows = np.frombuffer(buckets.read_one(layout.file(number, "rows")), ROWS)
    indices = layout.indices(number)
    (data,) = files.read_ranges(str(layout.candidates), [(indices.start, len(indices))])
    candidates = np.frombuffer(data, np.uint8)
    pairs = buckets.frames(buckets.read(layout.file(number, "pairs"), 0, layout.pair_buckets))
    wanted = sorted(
        (index, record)
        for _, index, record in pairs
        if candidates[index - indices.start] == CANDIDATE
    )
    scores = np.full(len(rows), math.nan)
    places = np.searchsorted(rows["index"], [index for index, _ in wanted])
    cosines = _cosines(model, [bytes(record) for _, record in wanted], config.batch_size, counted)
    scores[places] = list(cosines)
    buckets.write_one(layout.file(number, "scores"), scores.astype("<f8").tobytes())


def _cosines(
    model: Model, records: list[bytes], batch_size: int, counted: Counted
) -> Iterator[float]:
    def prepare(record: bytes) -> tuple[Images, list[str]]:
        pair = decode_example(record)
        images = model.image_preprocess.batch(pair["image"][0])
        return images, [text.decode() for text in pair["caption"]]

    for batch in read_ahead(reinforce.batches(records, batch_size), prepare):
        images = concatenate([image for image, _ in batch])
        tokens = model.tokenize([text for _, texts in batch for text in texts], truncate=True)
        image_embeddings = unit(model.encode_image(images, batch_size=batch_size))
        text_embeddings = unit(model.encode_text(tokens, batch_size=batch_size))
        owner = np.repeat(np.arange(len(batch)), [len(texts) for _, texts in batch])
        cosines = np.einsum("te,te->t", image_embeddings[owner], text_embeddings, dtype=np.float64)
        yield from np.bincount(owner, cosines) / np.bincount(owner)
        deque(counted(range(len(batch))), maxlen=0)


# --------------------------------------------------------------------------------------- shards


@functools.lru_cache(maxsize=1)
def _verdicts(config: PrepareConfig, layout: Layout) -> UInt8[np.ndarray, " N"]:
    return np.frombuffer(files.read(layout.verdicts), np.uint8)


def forget() -> None:
    """Clear the caches of this process: source, model and verdicts may have changed."""
    models = (reinforce.model, reinforce.teacher, reinforce.origins, reinforce.describe_models)
    for cached in (opened, *models, _verdicts):
        cached.cache_clear()


def write(config: PrepareConfig, layout: Layout, group: Group, counted: Counted) -> str:
    """Gather the pairs of some shards from the files of all reading tasks, and write them."""
    verdicts, pairs = _verdicts(config, layout), []
    paths = [layout.file(number, "pairs") for number in _sources(config, layout, group)]
    for data in buckets.read_all(paths, *group.buckets):
        pairs += [
            (order, index, bytes(record))
            for order, index, record in buckets.frames(data)
            if verdicts[index] == CANDIDATE
        ]
    pairs.sort(key=lambda pair: pair[:2])
    pairs = pairs[group.skip : group.skip + group.pairs]
    lines, size = [], config.samples_per_shard
    for number in range(group.first, group.last):
        shard, statistics = layout.shard(number, group.count), Statistics()
        if read_statistics(shard):
            continue
        files.remove_partial(shard)
        start = (number - group.first) * size
        inside = pairs[start : start + size]
        records = (_kept(inside[i][2], statistics) for i in counted(range(len(inside))))
        lines.append(_write_shard(config, shard, records, statistics, len(inside)))
    return "\n".join(lines)


def _sources(config: PrepareConfig, layout: Layout, group: Group) -> range:
    """Return the reading tasks that may have a group's pairs; without a shuffle only a few."""
    if config.shuffle:
        return range(layout.reads)
    first, last = (bucket * layout.samples // layout.pair_buckets for bucket in group.buckets)
    tasks = (max(0, first - 1) // layout.per_task, (last + 1) // layout.per_task + 1)
    return range(tasks[0], min(tasks[1], layout.reads))


def _kept(record: bytes, statistics: Statistics) -> bytes:
    """Count a record that is written, and return it."""
    features = decode_example(record)
    (image,), captions = features["image"], [text.decode() for text in features["caption"]]
    statistics.keep(size_of(image), len(image), captions)
    return record


def _without_image(record: bytes) -> bytes:
    features = decode_example(record)
    del features["image"]
    return encode_example(features)


def _write_shard(
    config: PrepareConfig,
    shard: AnyPath,
    records: Iterator[bytes],
    statistics: Statistics,
    samples: int,
) -> str:
    from array_record.python.array_record_module import ArrayRecordWriter

    if config.has_models:
        records = reinforce.extended(config, records)
    if config.encode == "none":
        records = map(_without_image, records)
    with files.written_whole(shard) as partial:
        if config.shards == "tar":
            with tarfile.open(partial, "w") as tar:
                for number, record in enumerate(records):
                    reinforce.add_to_tar(tar, f"{shard.name[6:11]}{number:07d}", record)
        else:
            writer: Any = ArrayRecordWriter(str(partial), "group_size:1")
            with contextlib.closing(writer):
                for record in records:
                    writer.write(record)
        size = partial.stat().st_size
    content = statistics.to_dict() | {"bytes": size}
    files.write_whole(statistics_of(shard), json.dumps(content))
    return f"{shard}: {statistics.num_kept:,} of {samples:,} pairs"


def read_statistics(shard: AnyPath) -> dict[str, Any]:
    """Return the statistics of a shard; {} unless it is complete: of the size that they state."""
    try:
        size, _ = files.stat(str(shard))
        statistics = parse(content_of(statistics_of(shard))) or {}
    except FileNotFoundError:
        return {}
    is_complete = statistics.keys() >= {*COUNTED}
    # Older files lack the size.
    return statistics if is_complete and statistics.get("bytes", size) == size else {}
