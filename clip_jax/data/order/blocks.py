"""The block order: records that are stored together are read at about the same time.

A shuffle block is a run of neighbouring records that one request reads. A batch is divided into
streams of `width` neighbouring places each, and a process has entire streams. In each epoch the
blocks are interleaved evenly over the streams: at any time all streams together read from all parts
of the source, as far apart as possible, so that data sorted by class or by day are spread over the
epoch. The blocks of all streams, one stream after another, are cut where each stream's share of the
epoch ends, so a record is in one stream only. A block that a cut divides becomes two pieces.

Within its stream, each record of a piece gets a random place in a range as wide as the shuffle
buffer, centred on the piece and mirrored at the stream's ends; records are read in the order of
these places. So a stream reads forward, its next record may come from any piece in the buffer, and
records of one piece meet as often as if they were drawn from a shuffle buffer one by one.

The random numbers are SplitMix64 (Steele, Lea and Flood, 2014) of (seed, epoch, record), computed
for arrays at a time: a library's generator could change between versions.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from clip_jax.errors import InputError

_STREAMS = (16, 512)  # maximum number: in small batches, and in the largest
_TINY = 64  # batch size up to which each place is a stream: any number of processes divides it
_WIDTH = 16  # places at least, so that a stream's share of a batch is enough work for a thread
_CHUNK = 1024  # minimum number of places of a stream whose order is computed at once
_KEPT = 6  # cached chunks of a stream: reading ahead and taking records use different ones
_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's
_QUOTIENTS = 40  # of a continued fraction: as many as a float64 can distinguish


def count_streams(batch_size: int) -> int:
    """Return the number of streams of a batch, a divisor of its size, on which alone it depends.

    Streams of large batches have 16 places or more, and their number is a multiple of the odd part
    of the size if possible, so that any usual number of processes divides it.
    """
    if batch_size <= _TINY:
        return batch_size
    most = min(_STREAMS[1], max(_STREAMS[0], batch_size // _WIDTH))
    divisors = [n for n in range(1, most + 1) if batch_size % n == 0]
    odd = batch_size // (batch_size & -batch_size)
    return max((n for n in divisors if n % odd == 0), default=divisors[-1])


@dataclass(frozen=True)
class Streams:
    """The streams of a batch, and those of one process, given as (index, count)."""

    batch_size: int
    process: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.count % self.process[1]:
            raise InputError(
                f"batch_size={self.batch_size} is read in {self.count} streams, which cannot be "
                f"divided among {self.process[1]} processes. Set --batch-size to 16 times a "
                "multiple of the number of processes, or --data.order global"
            )

    @functools.cached_property
    def count(self) -> int:
        return count_streams(self.batch_size)

    @functools.cached_property
    def width(self) -> int:
        """Number of places that a stream has in a batch."""
        return self.batch_size // self.count

    @property
    def of_process(self) -> range:
        """Indices of this process's streams."""
        each = self.count // self.process[1]
        return range(self.process[0] * each, (self.process[0] + 1) * each)

    def before(self, position: int) -> Int64[np.ndarray, " streams"]:
        """Count the positions before this one, for each stream."""
        batches, offset = divmod(position, self.batch_size)
        rest = offset - np.arange(self.count, dtype=np.int64) * self.width
        return batches * self.width + np.clip(rest, 0, self.width)


class Run(NamedTuple):
    """Records at consecutive places of a stream, each with the piece that contains it."""

    record: Int64[np.ndarray, " places"]
    epoch: Int64[np.ndarray, " places"]
    first: Int64[np.ndarray, " places"]  # first record of the piece
    last: Int64[np.ndarray, " places"]  # the record after its last one


@runtime_checkable
class StreamOrder(Protocol):
    """The records of each stream, in the order in which they are read."""

    def at(self, stream: int, offset: int, count: int) -> Run:
        """Return `count` records of a stream from its place `offset` on."""
        ...

    def reach(self, stream: int) -> int:
        """Return the maximum number of places over which the records of a piece are spread."""
        ...


def joined(runs: Sequence[Run]) -> Run:
    """Concatenate consecutive runs."""
    return Run(*(np.concatenate(arrays) for arrays in zip(*runs, strict=True)))


@dataclass(frozen=True)
class OfPositions:
    """Counts the records that each stream has read when an epoch begins: epoch e is exactly the
    positions from e to e + 1 times the length."""

    streams: Streams
    length: int

    def __call__(self, epoch: int) -> Int64[np.ndarray, " streams"]:
        return self.streams.before(epoch * self.length)


@dataclass(frozen=True)
class Equal:
    """The same where streams have equal shares of each epoch, up to one record, which do not depend
    on positions: a mixture's later weights, and so its members' positions, may still change."""

    streams: Streams
    length: int

    def __call__(self, epoch: int) -> Int64[np.ndarray, " streams"]:
        return (epoch * self.length + np.arange(self.streams.count)) // self.streams.count


class BlockOrder:
    """The block order of one source, whose blocks have `sizes` records."""

    def __init__(
        self, sizes: Int64[np.ndarray, " blocks"], *, seed: int, shuffle_blocks: int, shares: Any
    ) -> None:
        """`shuffle_blocks` is the size of the shuffle buffer for all streams together."""
        self._sizes, self._seed, self._shares = sizes, seed, shares
        self._firsts = np.cumsum(sizes) - sizes
        self._length = int(sizes.sum())
        streams = shares.streams.count
        self._spread = max(1, shuffle_blocks // streams) * self._length / len(sizes)  # places
        self._chunks: dict[int, list[tuple[int, Run]]] = {}  # by stream: first offset, records
        self._epoch = functools.lru_cache(maxsize=2)(self._permuted)

    def at(self, stream: int, offset: int, count: int) -> Run:
        """Return `count` records of a stream from its place `offset` on."""
        runs = []
        while count:
            start, chunk = self._chunk_with(stream, offset)
            at = offset - start
            runs.append(Run(*(array[at : at + count] for array in chunk)))
            length = len(runs[-1].record)
            offset += length
            count -= length
        return joined(runs)

    def reach(self, stream: int) -> int:
        """Return the maximum number of places over which the records of a piece are spread.

        Places are random, and ranks deviate from them by about the root of a third of the spread:
        the margin is at least forty times as much.
        """
        longest = self._length // self._shares.streams.count + self._shares.streams.width + 1
        return min(longest, int(1.2 * self._spread) + _CHUNK)

    def _chunk_with(self, stream: int, offset: int) -> tuple[int, Run]:
        """Return the chunk that contains a place, and the place at which it starts."""
        cached = self._chunks.get(stream, [])
        for start, run in cached:
            if start <= offset < start + len(run.record):
                return start, run
        most = (offset + 1) * self._shares.streams.count + self._shares.streams.batch_size
        epochs = range(most // self._length + 2)
        epoch = bisect.bisect_right(epochs, offset, key=lambda e: int(self._shares(e)[stream])) - 1
        before = int(self._shares(epoch)[stream])
        length = int(self._shares(epoch + 1)[stream]) - before
        chunks = max(1, int(length / max(self._spread, _CHUNK)))
        number = (offset - before) * chunks // length
        while True:
            start, run = self._chunk(epoch, stream, number, chunks)
            if offset - before < start:
                number -= 1
            elif offset - before >= start + len(run.record):
                number += 1
            else:
                self._chunks[stream] = [(before + start, run), *cached[: _KEPT - 1]]
                return before + start, run

    def _permuted(self, epoch: int) -> tuple[Any, Any, Any]:
        """Return the blocks of an epoch in order, where each ends, and where streams are cut."""
        shares = self._shares(epoch + 1) - self._shares(epoch)
        cuts = np.concatenate([[0], np.cumsum(shares)])
        order = self._interleaved(epoch, cuts)
        return order, np.cumsum(self._sizes[order]), cuts

    def _interleaved(
        self, epoch: int, cuts: Int64[np.ndarray, " cuts"]
    ) -> Int64[np.ndarray, " blocks"]:
        """Return the blocks, stream after stream, so that those read at one time are far apart.

        Block i is read at the time {i a + b}, for an a whose continued fraction has random
        quotients, none above 3: any part of such an order contains its share of any part of the
        source, up to a few blocks (Kuipers and Niederreiter, 1974, chapter 2, theorem 3.4). Blocks
        of the same time are assigned to the streams at random.
        """
        index = np.arange(len(self._sizes))
        slope = 0.0
        for random in _random(self._seed, epoch, 2, np.arange(_QUOTIENTS)):
            slope = 1 / (1 + int(random) % 3 + slope)
        start = _share(_random(self._seed, epoch, 3, index[:1]))
        by_time = np.argsort((index * slope + start) % 1, kind="stable")
        rounds = index // (len(cuts) - 1)
        by_time = by_time[np.lexsort((_random(self._seed, epoch, 0, index), rounds))]
        middles = (index + 0.5) * self._length / len(index)  # as if all were equally long
        streams = np.searchsorted(cuts, middles, "right") - 1
        interleaved = np.empty_like(by_time)
        interleaved[
            np.argsort((middles - cuts[streams]) / np.diff(cuts)[streams], kind="stable")
        ] = by_time
        return interleaved

    def _chunk(self, epoch: int, stream: int, number: int, chunks: int) -> tuple[int, Run]:
        """Return the records whose random places are in one of a stream's equal chunks."""
        order, ends, cuts = self._epoch(epoch)
        start, stop = int(cuts[stream]), int(cuts[stream + 1])
        length = stop - start
        spread = self._spread if self._spread < length else 2.0 * length
        low, high = (length * n / chunks for n in (number, number + 1))
        # No record is placed farther than half the spread from the middle of its piece.
        reach = (low - spread / 2, high + spread / 2)
        begin, end = (start + int(min(max(edge, 0), length)) for edge in reach)
        inside = slice(
            np.searchsorted(ends, begin, "right"), np.searchsorted(ends, end, "right") + 1
        )
        pieces = order[inside]
        tops = np.minimum(ends[inside], stop)
        lows = np.maximum(ends[inside] - self._sizes[pieces], start)
        firsts = self._firsts[pieces] + lows - (ends[inside] - self._sizes[pieces])
        sizes = tops - lows
        owner = np.repeat(np.arange(len(pieces)), sizes)
        inner = np.arange(len(owner)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        records = firsts[owner] + inner
        middles = lows - start + sizes / 2
        places = middles[owner] + (_share(_random(self._seed, epoch, 1, records)) - 0.5) * spread
        places = length - np.abs(length - np.abs(places))  # mirrored
        earlier = int(lows[0]) - start + int(np.count_nonzero(places < low))
        chosen = np.flatnonzero((places >= low) & ((places < high) | (number == chunks - 1)))
        chosen = chosen[np.argsort(places[chosen], kind="stable")]
        firsts, lasts = firsts[owner[chosen]], (firsts + sizes)[owner[chosen]]
        return earlier, Run(records[chosen], np.full(len(chosen), epoch), firsts, lasts)


def _random(
    seed: int, epoch: int, channel: int, index: Int64[np.ndarray, " N"]
) -> UInt64[np.ndarray, " N"]:
    """Return SplitMix64 numbers, independent for each seed, epoch and channel."""
    key = np.zeros(1, np.uint64)
    for number in (seed, epoch, channel):
        key = _mix(key + np.uint64(_GAMMA) + np.uint64(number))
    return _mix(index.astype(np.uint64) * np.uint64(_GAMMA) + key)


def _share(random: UInt64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """Scale to [0, 1)."""
    return (random >> np.uint64(11)) / 2.0**53


def _mix(x: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
