"""An order of shuffle blocks: records stored together come near each other in time.

A block is a run of neighbouring records that one request reads. Place j of a batch belongs to
stream j div width, and a process has whole streams. In each epoch the blocks are interleaved evenly
over the streams: what all streams read at a time is from all over the source, as far apart as can
be, so that what is stored sorted (by class, by day) is spread over an epoch. The blocks of all
streams, one stream's behind another's, are cut where each stream's share of the epoch ends: a
record is in one stream. A block that a cut divides becomes two pieces. In its stream, each of a
piece's records gets a random place among as many as the shuffle buffer has blocks, around the
piece's own place and mirrored at the stream's ends; their order is that of these places. So a
stream reads forward, each of its next records may come from any piece in the buffer, and records of
one piece meet as often as records that are drawn from such a buffer one by one.

The random numbers are SplitMix64 (Steele, Lea and Flood, 2014) of (seed, epoch, record), by whole
arrays, and not a library's, whose streams may change.
"""

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64, UInt64

from clip_jax.errors import InputError

_STREAMS = (16, 512)  # at most: in small batches, and in the largest
_TINY = 64  # a batch in which each place is a stream: any number of processes divides it
_WIDTH = 16  # places, so that a stream's share of a batch is worth a thread's while
_CHUNK = 1024  # places of a stream whose order is found at once, at least
_KEPT = 6  # chunks of a stream: those who read ahead are not where those are who wait
_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's
_QUOTIENTS = 40  # of a continued fraction: as many as a float64 tells apart


def count_streams(batch_size: int) -> int:
    """Return how many streams a batch has: it follows from its size alone, and divides it.

    As many as 16 places each allow, and a multiple of the odd part of the size where there is one,
    so that any usual number of processes divides it.
    """
    if batch_size <= _TINY:
        return batch_size
    most = min(_STREAMS[1], max(_STREAMS[0], batch_size // _WIDTH))
    divisors = [n for n in range(1, most + 1) if batch_size % n == 0]
    odd = batch_size // (batch_size & -batch_size)
    return max((n for n in divisors if n % odd == 0), default=divisors[-1])


@dataclass(frozen=True)
class Streams:
    """The streams of a batch, and those that one of several processes has."""

    batch_size: int
    process: tuple[int, int] = (0, 1)

    def __post_init__(self) -> None:
        if self.count % self.process[1]:
            raise InputError(
                f"batch_size={self.batch_size} is read in {self.count} streams, which "
                f"{self.process[1]} processes do not divide; choose a batch size that is 16 times "
                "a multiple of the processes, or data.order=global"
            )

    @functools.cached_property
    def count(self) -> int:
        return count_streams(self.batch_size)

    @property
    def width(self) -> int:
        """Places of a batch in a stream."""
        return self.batch_size // self.count

    @property
    def own(self) -> range:
        """Numbers of this process's streams."""
        each = self.count // self.process[1]
        return range(self.process[0] * each, (self.process[0] + 1) * each)

    def before(self, position: int) -> Int64[np.ndarray, " streams"]:
        """How many of the positions before this one each stream has."""
        batches, offset = divmod(position, self.batch_size)
        rest = offset - np.arange(self.count, dtype=np.int64) * self.width
        return batches * self.width + np.clip(rest, 0, self.width)


class Run(NamedTuple):
    """Records at places of a stream that follow each other, and the piece that each lies in."""

    record: Int64[np.ndarray, " places"]
    epoch: Int64[np.ndarray, " places"]
    first: Int64[np.ndarray, " places"]  # record of the piece
    last: Int64[np.ndarray, " places"]  # the one after it


@runtime_checkable
class StreamOrder(Protocol):
    """What each stream reads."""

    def at(self, stream: int, offset: int, count: int) -> Run:
        """The records at the places from `offset` on: how many the stream had before."""
        ...

    def reach(self, stream: int) -> int:
        """Places of the stream in which a piece is begun and ended, at most."""
        ...


def joined(runs: Sequence[Run]) -> Run:
    """One run of several that follow each other."""
    return Run(*(np.concatenate(arrays) for arrays in zip(*runs, strict=True)))


@dataclass(frozen=True)
class OfPositions:
    """Count the records of a source that each stream has read when an epoch begins.

    Epoch e is exactly the positions from e to e + 1 times the length.
    """

    streams: Streams
    length: int

    def __call__(self, epoch: int) -> Int64[np.ndarray, " streams"]:
        return self.streams.before(epoch * self.length)


@dataclass(frozen=True)
class Equal:
    """Streams take equal shares, up to one record: a stream's offset alone says what it has had, as
    the members of a mixture need, whose later weights are not known yet."""

    streams: Streams
    length: int

    def __call__(self, epoch: int) -> Int64[np.ndarray, " streams"]:
        return (epoch * self.length + np.arange(self.streams.count)) // self.streams.count


class BlockOrder:
    """The order of one source whose records lie in blocks of `sizes`."""

    def __init__(
        self, sizes: Int64[np.ndarray, " blocks"], *, seed: int, shuffle_blocks: int, shares: Any
    ) -> None:
        """`shuffle_blocks` is the size of the shuffle buffer, over all streams."""
        self._sizes, self._seed, self._shares = sizes, seed, shares
        self._firsts = np.cumsum(sizes) - sizes
        self._length = int(sizes.sum())
        streams = shares.streams.count
        self._spread = max(1, shuffle_blocks // streams) * self._length / len(sizes)  # places
        self._chunks: dict[int, list[tuple[int, Run]]] = {}  # of each stream: first offset, records
        self._epoch = functools.lru_cache(maxsize=2)(self._permuted)

    def at(self, stream: int, offset: int, count: int) -> Run:
        """The records at `count` places of a stream."""
        runs = []
        while count:
            start, chunk = self._chunk_with(stream, offset)
            at = offset - start
            runs.append(Run(*(array[at : at + count] for array in chunk)))
            offset, count = offset + len(runs[-1].record), count - len(runs[-1].record)
        return joined(runs)

    def reach(self, stream: int) -> int:
        """Places of the stream in which a piece is begun and ended, at most.

        Places are random, and ranks stray from them by about the root of a third of the spread: the
        room for it is forty times as much, or more.
        """
        longest = self._length // self._shares.streams.count + self._shares.streams.width + 1
        return min(longest, int(1.2 * self._spread) + _CHUNK)

    def _chunk_with(self, stream: int, offset: int) -> tuple[int, Run]:
        """The chunk that holds a place, and the place at which it starts."""
        kept = self._chunks.get(stream, [])
        for start, run in kept:
            if start <= offset < start + len(run.record):
                return start, run
        most = (offset + 1) * self._shares.streams.count + self._shares.streams.batch_size
        epochs = range(most // self._length + 2)
        epoch = bisect.bisect_right(epochs, offset, key=lambda e: int(self._shares(e)[stream])) - 1
        before, after = (int(self._shares(e)[stream]) for e in (epoch, epoch + 1))
        length = after - before
        chunks = max(1, int(length / max(self._spread, _CHUNK)))
        number = (offset - before) * chunks // length
        while True:
            start, run = self._chunk(epoch, stream, number, chunks)
            if offset - before < start:
                number -= 1
            elif offset - before >= start + len(run.record):
                number += 1
            else:
                self._chunks[stream] = [(before + start, run), *kept[: _KEPT - 1]]
                return before + start, run

    def _permuted(self, epoch: int) -> tuple[Any, Any, Any]:
        """The blocks of an epoch in their order, where each ends, and where streams are cut."""
        shares = self._shares(epoch + 1) - self._shares(epoch)
        cuts = np.concatenate([[0], np.cumsum(shares)])
        order = self._interleaved(epoch, cuts)
        return order, np.cumsum(self._sizes[order]), cuts

    def _interleaved(
        self, epoch: int, cuts: Int64[np.ndarray, " cuts"]
    ) -> Int64[np.ndarray, " blocks"]:
        """One stream's blocks behind another's, so that those of one time are from everywhere.

        By time, block i comes at {i a + b}, for an a whose continued fraction has random
        quotients, none above 3: any part of such an order holds its share of any part of the
        source, up to a few blocks (Kuipers and Niederreiter, 1974, chapter 2, theorem 3.4). Of
        those that come at one time, which stream has which is random.
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
        """Those of a stream's records whose random places lie in one of its equal chunks."""
        order, ends, cuts = self._epoch(epoch)
        start, stop = int(cuts[stream]), int(cuts[stream + 1])
        length = stop - start
        spread = self._spread if self._spread < length else 2.0 * length
        low, high = (length * n / chunks for n in (number, number + 1))
        # No offset is farther than half the spread from its piece's middle.
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
    """SplitMix64 of a channel of its own for each seed and epoch."""
    key = np.zeros(1, np.uint64)
    for number in (seed, epoch, channel):
        key = _mix(key + np.uint64(_GAMMA) + np.uint64(number))
    return _mix(index.astype(np.uint64) * np.uint64(_GAMMA) + key)


def _share(random: UInt64[np.ndarray, " N"]) -> Float64[np.ndarray, " N"]:
    """From 0 on and below 1."""
    return (random >> np.uint64(11)) / 2.0**53


def _mix(x: UInt64[np.ndarray, " N"]) -> UInt64[np.ndarray, " N"]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
