"""Decide which samples to keep after all are read: one process, with a byte in memory for each
sample, and nine more to keep the share with the best scores."""

import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from jaxtyping import Float64, Int64, UInt8, UInt64

from clip_jax.data.sources import StoredSource
from clip_jax.prepare import buckets, near
from clip_jax.prepare.layout import Group, Layout, PrepareConfig
from clip_jax.prepare.stages import CANDIDATE, DUPLICATE, NEAR, NOT_TOP, REPEATED, ROWS, SCORE
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

_THREADS = 16  # for reading files ahead

REASONS = {
    DUPLICATE: "duplicate image",
    NEAR: "near duplicate",
    SCORE: "score",
    NOT_TOP: "score not in the top share",
}


@dataclass
class Dropped:
    """What the report contains about samples dropped in comparison with others."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    samples: Iterable[tuple[str, str]] = ()  # keys and reasons, if they are to be listed
    near: tuple[int, int] | None = None  # indices of the first near-duplicate and of its original


def candidates(layout: Layout, config: PrepareConfig) -> tuple[UInt8[np.ndarray, " N"], Dropped]:
    """Decide which samples are left without duplicates; also write it for scoring tasks."""
    verdicts, dropped = np.zeros(layout.samples, np.uint8), Dropped()
    for rows in _rows(layout):
        verdicts[rows["index"]] = CANDIDATE
    kinds = {"same": (DUPLICATE, layout.join_buckets)} if config.drop_duplicates else {}
    if config.drop_near_duplicates:
        kinds["alike"] = (NEAR, near.BANDS * layout.join_buckets)
    for kind, (verdict, count) in kinds.items():
        first = []
        for data in _ahead([layout.joined(kind, bucket) for bucket in range(count)]):
            repeated = np.frombuffer(data, REPEATED)
            new = verdicts[repeated["index"]] != DUPLICATE if verdict == NEAR else slice(None)
            verdicts[repeated["index"][new]] = verdict
            first += repeated[new][:1].tolist()
        if verdict == NEAR:
            dropped.near = min(first, default=None)
    files.write_whole(layout.candidates, verdicts.tobytes())
    return verdicts, dropped


def settle(
    layout: Layout, config: PrepareConfig, verdicts: UInt8[np.ndarray, " N"]
) -> UInt8[np.ndarray, " N"]:
    """Decide by scores, too; also write it for the tasks that write shards."""
    if config.score_with:
        for index, score in _scored(layout, config, verdicts):
            out = np.isnan(score) | (score < config.min_score) | (score > config.max_score)
            verdicts[index[out]] = SCORE
    if config.top_share < 1 and CANDIDATE in verdicts:
        indices, scores = map(np.concatenate, zip(*_scored(layout, config, verdicts), strict=True))
        wanted = math.ceil(Fraction(str(config.top_share)) * len(scores))
        least = np.partition(scores, -wanted)[-wanted]
        ties = np.flatnonzero(scores == least)
        out = scores < least
        out[ties[wanted - np.count_nonzero(scores > least) :]] = True
        verdicts[indices[out]] = NOT_TOP
    files.write_whole(layout.verdicts, verdicts.tobytes())
    return verdicts


def groups(layout: Layout, config: PrepareConfig, verdicts: UInt8[np.ndarray, " N"]) -> list[Group]:
    """Divide kept pairs into shards of equal size, and the shards among tasks."""
    counts = np.zeros(layout.pair_buckets, np.int64)
    for rows in _rows(layout):
        orders = rows["order"][verdicts[rows["index"]] == CANDIDATE]
        numbers = buckets.number_of(orders, layout.pair_buckets)
        counts += np.bincount(numbers.astype(np.int64), minlength=len(counts))
    ends: Int64[np.ndarray, " buckets"] = np.cumsum(counts)
    pairs = int(ends[-1])
    size = config.samples_per_shard
    shards = -(-pairs // size)
    shards_per_task = max(1, layout.per_task // size)
    tasks = []
    for first in range(0, shards, shards_per_task):
        last = min(first + shards_per_task, shards)
        start = first * size
        end = min(last * size, pairs)
        low = int(np.searchsorted(ends, start, side="right"))
        high = int(np.searchsorted(ends, end, side="left")) + 1
        skip = start - (int(ends[low - 1]) if low else 0)
        tasks.append(Group(first, last, shards, (low, high), skip, end - start))
    return tasks


def describe(dropped: Dropped, verdicts: UInt8[np.ndarray, " N"], source: StoredSource) -> Dropped:
    """Count dropped samples by reason, with an example of each."""
    for verdict, reason in REASONS.items():
        has_verdict = verdicts == verdict
        if not has_verdict.any():
            continue
        dropped.counts[reason] = int(has_verdict.sum())
        example = f"{source.key(int(np.argmax(has_verdict)))}: {reason}"
        if verdict == NEAR and dropped.near:
            example += f" of {source.key(dropped.near[1])}"
        dropped.examples[reason] = example
    return dropped


def listed(
    layout: Layout, config: PrepareConfig, verdicts: UInt8[np.ndarray, " N"], source: StoredSource
) -> Iterator[tuple[str, str]]:
    """Yield the key of each sample dropped in comparison with others, with the reason."""
    originals = {
        DUPLICATE: _originals(layout, "same", layout.join_buckets if config.drop_duplicates else 0),
        NEAR: _originals(
            layout, "alike", near.BANDS * layout.join_buckets if config.drop_near_duplicates else 0
        ),
    }
    for index in np.flatnonzero(np.isin(verdicts, list(REASONS))).tolist():
        verdict = int(verdicts[index])
        reason = REASONS[verdict]
        if verdict in originals:
            reason += f" of {source.key(originals[verdict][index])}"
        yield source.key(index), reason


def _originals(layout: Layout, kind: str, count: int) -> dict[int, int]:
    """Return the first of the samples that each duplicate repeats, by their indices."""
    first: dict[int, int] = {}
    for data in _ahead([layout.joined(kind, bucket) for bucket in range(count)]):
        for index, of in np.frombuffer(data, REPEATED).tolist():
            first[index] = min(of, first.get(index, of))
    return first


def _scored(
    layout: Layout, config: PrepareConfig, verdicts: UInt8[np.ndarray, " N"]
) -> Iterator[tuple[UInt64[np.ndarray, " n"], Float64[np.ndarray, " n"]]]:
    """Yield the indices and scores of the samples that are left, task by task."""
    paths = [layout.file(number, "scores") for number in range(layout.reads)]
    of_model = _ahead(paths) if config.score_with else iter(())
    for rows in _rows(layout):
        score = np.frombuffer(next(of_model), "<f8") if config.score_with else rows["score"]
        left = verdicts[rows["index"]] == CANDIDATE
        yield rows["index"][left], score[left]


def _rows(layout: Layout) -> Iterator[np.ndarray]:
    paths = [layout.file(number, "rows") for number in range(layout.reads)]
    return (np.frombuffer(data, ROWS) for data in _ahead(paths))


def _ahead(paths: list[AnyPath]) -> Iterator[bytes]:
    """Read files in their order, some of them ahead."""
    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(paths), _THREADS):
            yield from threads.map(buckets.read_one, paths[start : start + _THREADS])
