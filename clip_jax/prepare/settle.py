"""What becomes of each sample, once all are read: one process, a byte a sample in memory.

Rows and scores are read file by file, as often as a question needs.
"""

import functools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np
from jaxtyping import Float64, Int64, UInt8, UInt64

from clip_jax.data.sources import SampleError, StoredSource
from clip_jax.prepare import buckets, near
from clip_jax.prepare.layout import Group, Layout, PrepareConfig
from clip_jax.prepare.stages import CANDIDATE, DUPLICATE, NEAR, NOT_TOP, REPEATED, ROWS, SCORE
from clip_jax.storage import files
from clip_jax.storage.files import Place

_THREADS = 16  # that read files ahead
_DIGIT = 16  # bits of a number decided at a time
_SHOWN = 12  # near duplicates

REASONS = {
    DUPLICATE: "duplicate image",
    NEAR: "near duplicate",
    SCORE: "score",
    NOT_TOP: "score not in the top share",
}


@dataclass
class Dropped:
    """What a report says of those that the comparison with others drops."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)
    near: list[tuple[int, int]] = field(default_factory=list)  # indices, and of what is like them


def candidates(layout: Layout, config: PrepareConfig) -> tuple[UInt8[np.ndarray, " N"], Dropped]:
    """Which samples are left when duplicates are gone; written for those that score."""
    verdicts, dropped = np.zeros(layout.samples, np.uint8), Dropped()
    for _, rows in _rows(layout):
        verdicts[rows["index"]] = CANDIDATE
    kinds = {"same": (DUPLICATE, layout.join_buckets)} if config.drop_duplicates else {}
    if config.drop_near_duplicates:
        kinds["alike"] = (NEAR, near.BANDS * layout.join_buckets)
    for kind, (verdict, count) in kinds.items():
        first: dict[int, int] = {}
        for data in _ahead([layout.joined(kind, bucket) for bucket in range(count)]):
            found = buckets.table(data, REPEATED)
            new = verdicts[found["index"]] != DUPLICATE if verdict == NEAR else slice(None)
            verdicts[found["index"][new]] = verdict
            for index, of in found[new][:_SHOWN].tolist():
                first[index] = min(of, first.get(index, of))
            first = dict(sorted(first.items())[:_SHOWN])
        if verdict == NEAR:
            dropped.near = list(first.items())
    files.write_whole(layout.candidates, verdicts.tobytes())
    return verdicts, dropped


def settle(
    layout: Layout, config: PrepareConfig, verdicts: UInt8[np.ndarray, " N"]
) -> UInt8[np.ndarray, " N"]:
    """Decide by scores too; written for those that gather the shards."""
    if config.score_with:
        for index, score in _scored(layout, config, verdicts):
            out = np.isnan(score) | (score < config.min_score) | (score > config.max_score)
            verdicts[index[out]] = SCORE
    if config.top_share < 1 and CANDIDATE in verdicts:
        chunks = functools.partial(_scored, layout, config, verdicts)
        wanted = math.ceil(Fraction(str(config.top_share)) * int((verdicts == CANDIDATE).sum()))
        least, ties = kth_largest(lambda: (score for _, score in chunks()), wanted)
        for index, score in chunks():
            keys = sortable(score)
            equal = np.flatnonzero(keys == least)
            out = keys < least
            out[equal[ties:]] = True
            ties -= min(ties, len(equal))
            verdicts[index[out]] = NOT_TOP
    files.write_whole(layout.verdicts, verdicts.tobytes())
    return verdicts


def sortable(numbers: Float64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """64 bits that are ordered as the numbers are."""
    bits = np.ascontiguousarray(numbers + 0.0, np.float64).view(np.uint64)  # -0 as 0
    sign = np.uint64(1 << 63)
    return np.where(bits & sign, ~bits, bits | sign)


def kth_largest(
    chunks: Callable[[], Iterator[Float64[np.ndarray, "..."]]], k: int
) -> tuple[np.uint64, int]:
    """The k-th largest number, `sortable`, and how many that equal it are among the k largest.

    Exact, by four readings, with 65,536 counts in memory.
    """
    prefix = 0
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for chunk in chunks():
            keys = sortable(chunk)
            if shift + _DIGIT < 64:
                keys = keys[keys >> np.uint64(shift + _DIGIT) == np.uint64(prefix)]
            digits = (keys >> np.uint64(shift)) & np.uint64((1 << _DIGIT) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << _DIGIT)
        above = np.cumsum(counts[::-1]) - counts[::-1]  # of each digit, from the largest
        place = int(np.searchsorted(above, k) - 1)
        k -= int(above[place])
        prefix = prefix << _DIGIT | ((1 << _DIGIT) - 1 - place)
    return np.uint64(prefix), k


def groups(layout: Layout, config: PrepareConfig, verdicts: UInt8[np.ndarray, " N"]) -> list[Group]:
    """Share what is kept among shards of equal size, and those among tasks."""
    counts = np.zeros(layout.pair_buckets, np.int64)
    for _, rows in _rows(layout):
        kept = rows["order"][verdicts[rows["index"]] == CANDIDATE]
        numbers = buckets.number_of(kept, layout.pair_buckets)
        counts += np.bincount(numbers.astype(np.int64), minlength=len(counts))
    ends: Int64[np.ndarray, " buckets"] = np.cumsum(counts)
    kept, size = int(ends[-1]), config.samples_per_shard
    shards, each = -(-kept // size), max(1, layout.per_task // size)
    found = []
    for first in range(0, shards, each):
        last = min(first + each, shards)
        start, end = first * size, min(last * size, kept)
        low = int(np.searchsorted(ends, start, side="right"))
        high = int(np.searchsorted(ends, end, side="left")) + 1
        skip = start - (int(ends[low - 1]) if low else 0)
        found.append(Group(first, last, shards, (low, high), skip, end - start))
    return found


def describe(dropped: Dropped, verdicts: UInt8[np.ndarray, " N"], source: StoredSource) -> Dropped:
    """Count by reason, with an example of each."""
    for verdict, reason in REASONS.items():
        if count := int((verdicts == verdict).sum()):
            dropped.counts[reason] = count
            index = int(np.argmax(verdicts == verdict))
            like = [of for near, of in dropped.near if near == index and verdict == NEAR]
            what = f"{reason}: looks like {source.key(like[0])}" if like else reason
            dropped.examples[reason] = f"{source.key(index)}: {what}"
    return dropped


def shown(
    alike: list[tuple[int, int]], source: StoredSource
) -> Iterator[tuple[bytes, str, bytes, str]]:
    """Near duplicates beside what they are near, as far as they can be read again."""
    for pair in alike:
        try:
            (first, said), (second, also) = ((source.image(i), source.key(i)) for i in pair)
        except SampleError:
            continue
        yield first, said, second, also


def _scored(
    layout: Layout, config: PrepareConfig, verdicts: UInt8[np.ndarray, " N"]
) -> Iterator[tuple[UInt64[np.ndarray, " n"], Float64[np.ndarray, " n"]]]:
    """Indices and scores of those that are left, task by task."""
    paths = [layout.file(number, "scores") for number in range(layout.reads)]
    of_model = _ahead(paths) if config.score_with else iter(())
    for _, rows in _rows(layout):
        score = np.frombuffer(next(of_model), "<f8") if config.score_with else rows["score"]
        left = verdicts[rows["index"]] == CANDIDATE
        yield rows["index"][left], score[left]


def _rows(layout: Layout) -> Iterator[tuple[int, np.ndarray]]:
    paths = [layout.file(number, "rows") for number in range(layout.reads)]
    for number, data in enumerate(_ahead(paths)):
        yield number, buckets.table(data, ROWS)


def _ahead(paths: list[Place]) -> Iterator[bytes]:
    """Read files in their order, some ahead."""
    with ThreadPoolExecutor(_THREADS) as threads:
        for start in range(0, len(paths), _THREADS):
            yield from threads.map(files.read, paths[start : start + _THREADS])
