"""Weighted mixtures of several sources, each in its own shuffled order."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from jaxtyping import Int64, UInt8

from clip_jax.data.order.blocks import BlockOrder, Equal, Run, Streams, joined
from clip_jax.data.sources import AnyRecord, BlockSource, Record, Source, StoredSource, blocks_of
from clip_jax.data.sources.any import SingleConfig
from clip_jax.data.sources.shards import Places
from clip_jax.errors import InputError, check_ranges

# Numbers of samples after which the weights hold exactly. The first one is used in which every
# member whose weight is not 0 has a sample.
_PERIODS = tuple(4096 << doublings for doublings in range(11))
ENDLESS = 1 << 53  # positions


@dataclass(frozen=True, kw_only=True)
class MemberConfig:
    """One source of a mixture, and its weight."""

    source: SingleConfig
    weight: float = 1.0  # Share of the samples, relative to the other members' weights.

    def __post_init__(self) -> None:
        check_ranges(self, "data.source.members.", weight="[0, inf)")


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """New weights of a mixture, from one position in the order of samples on."""

    from_sample: int  # Position of the first sample: finished steps × batch size.
    weights: tuple[float, ...]  # One weight for each member, in their order; 0: not read.

    def __post_init__(self) -> None:
        check_ranges(self, "data.source.phases.", from_sample="[0, inf)", weights="[0, inf)")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """A mixture of sources by weight. To change the weights of a run, add a phase where it resumes.
    Append new members at the end, with weight 0 in earlier phases, which must not change."""

    members: tuple[MemberConfig, ...] = ()  # Sources with their initial weights.
    phases: tuple[PhaseConfig, ...] = ()  # Later changes of the weights, in ascending order.

    def __post_init__(self) -> None:
        starts = [0, *(phase.from_sample for phase in self.phases)]
        if not self.members:
            raise InputError("data.source.members is empty; add at least one MemberConfig")
        if starts != sorted(starts):
            raise InputError(
                f"data.source.phases start at {starts[1:]}; put them in ascending order"
            )
        for weights in (self.weights, *(phase.weights for phase in self.phases)):
            if len(weights) != len(self.members) or not sum(weights) > 0:
                raise InputError(
                    f"data.source has the weights {weights}; it needs {len(self.members)}, one "
                    "for each member, and not all 0"
                )
            _counts(weights)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights before the first phase."""
        return tuple(member.weight for member in self.members)


class _Pattern:
    """The member of each sample of a period, and how many of its samples precede it there."""

    def __init__(self, weights: Sequence[float]) -> None:
        self.counts, self.period = _counts(weights)
        places = [(np.arange(count) + 0.5) / count for count in self.counts]
        order = np.argsort(np.concatenate(places), kind="stable")
        self.member = np.repeat(np.arange(len(weights)), self.counts)[order]
        self.rank = np.concatenate([np.arange(count) for count in self.counts])[order]


def _counts(weights: Sequence[float]) -> tuple[Int64[np.ndarray, " members"], int]:
    """Return the number of each member's samples in a period, and the period's length."""
    shares = np.asarray(weights, np.float64) / sum(weights)
    for period in _PERIODS:
        counts = np.floor(shares * period).astype(np.int64)
        largest_rests = np.argsort(counts - shares * period, kind="stable")
        counts[largest_rests[: period - counts.sum()]] += 1
        if all(counts[shares > 0]):
            return counts, period
    raise InputError(
        f"data.source has the weights {tuple(weights)}; the smallest is less than one of "
        f"{_PERIODS[-1]} samples. Raise it, or set it to 0 to leave its member out"
    )


@dataclass(frozen=True)
class _Phase:
    """A pattern that repeats from a position on, and how many samples each member had before."""

    start: int
    before: Int64[np.ndarray, " members"]
    pattern: _Pattern

    def at(self, position: int) -> tuple[int, int]:
        """Return the member of a position, and how many samples it had before."""
        period, offset = divmod(position - self.start, self.pattern.period)
        member = int(self.pattern.member[offset])
        done = (
            self.before[member] + period * self.pattern.counts[member] + self.pattern.rank[offset]
        )
        return member, int(done)

    def counts_before(self, position: int) -> Int64[np.ndarray, " members"]:
        """Count each member's samples before a position."""
        period, offset = divmod(position - self.start, self.pattern.period)
        rest = np.bincount(self.pattern.member[:offset], minlength=len(self.before))
        return self.before + period * self.pattern.counts + rest


def _phases(starts: Sequence[int], patterns: Sequence[_Pattern]) -> list[_Phase]:
    """Return the phases that begin at these positions, of all samples or of one stream."""
    phases = [_Phase(0, np.zeros_like(patterns[0].counts), patterns[0])]
    for start, pattern in zip(starts[1:], patterns[1:], strict=True):
        phases.append(_Phase(start, phases[-1].counts_before(start), pattern))
    return phases


class MixtureSource:
    """All members' samples, one member after the other; `order` mixes them."""

    def __init__(self, config: MixtureConfig, members: Sequence[Source]) -> None:
        self.members = members
        self._places = Places(map(len, members))
        self._starts = np.cumsum([0, *map(len, members)]).tolist()
        self._begins = [0, *(phase.from_sample for phase in config.phases)]
        weights = [config.weights, *(phase.weights for phase in config.phases)]
        self._patterns = [_Pattern(of_phase) for of_phase in weights]

    def __len__(self) -> int:
        return len(self._places)

    def key(self, index: int) -> str:
        """Return the index of the member and its own key."""
        member, record = self._places.find(index)
        return f"{member}/{self.members[member].key(record)}"

    def load(
        self, index: int, rng: np.random.Generator
    ) -> tuple[bytes | UInt8[np.ndarray, "H W 3"], str]:
        """Load the member's sample."""
        member, record = self._places.find(index)
        return self.members[member].load(record, rng)

    def record(self, index: int) -> AnyRecord:
        """Return the member's sample as it is stored; its members must be `StoredSource`s."""
        member, record = self._places.find(index)
        return cast(StoredSource, self.members[member]).record(record)

    def order(self, seed: int) -> Any:
        """Return an endless grain.MapDataset of indices; a member is shuffled in each epoch."""
        import grain

        orders = [
            grain.MapDataset.range(len(member)).seed((seed + number) % 2**32).shuffle().repeat()
            for number, member in enumerate(self.members)
        ]
        phases = _phases(self._begins, self._patterns)
        index = functools.partial(_index, phases, self._starts, orders)
        return grain.MapDataset.range(ENDLESS).map(index)

    def blocks(self) -> Int64[np.ndarray, " blocks"]:
        """Return all members' blocks; a member without blocks has one for each record."""
        return np.concatenate([blocks_of(member) for member in self.members])

    def size(self, first: int, last: int) -> int:
        """Return the size of these records in bytes; 0 for a member without blocks."""
        number, record = self._places.find(first)
        member = self.members[number]
        if not isinstance(member, BlockSource):
            return 0
        return member.size(record, record + last - first)

    def fetch(self, first: int, last: int) -> list[AnyRecord]:
        """Read records of one block of a member."""
        number, record = self._places.find(first)
        member = self.members[number]
        if not isinstance(member, BlockSource):
            return [Record(self.key(first), 0, functools.partial(member.load, record))]
        records = member.fetch(record, record + last - first)
        return [stored._replace(key=f"{number}/{stored.key}") for stored in records]

    def stream_order(self, seed: int, streams: Streams, shuffle_blocks: int) -> "StreamMixture":
        """Return the block order: each stream advances in each member by itself."""
        orders = [
            BlockOrder(
                blocks_of(member),
                seed=(seed + number) % 2**32,
                shuffle_blocks=shuffle_blocks,
                shares=Equal(streams, len(member)),
            )
            for number, member in enumerate(self.members)
        ]
        begins = [streams.before(start) for start in self._begins]
        return StreamMixture(self._starts, orders, begins, self._patterns)


class StreamMixture:
    """The block order of a mixture: all streams alternate between members by the same pattern."""

    def __init__(
        self,
        starts: list[int],
        orders: list[BlockOrder],
        begins: list[Int64[np.ndarray, " streams"]],
        patterns: list[_Pattern],
    ) -> None:
        self._starts = starts
        self._orders = orders
        self._patterns = patterns
        self._phases = functools.cache(
            lambda stream: _phases([int(begin[stream]) for begin in begins], patterns)
        )

    def at(self, stream: int, offset: int, count: int) -> Run:
        """Return `count` records of a stream from its place `offset` on."""
        phases = self._phases(stream)
        runs = []
        while count:
            number = max(i for i, phase in enumerate(phases) if phase.start <= offset)
            end = phases[number + 1].start if number + 1 < len(phases) else ENDLESS
            here = min(count, end - offset)
            runs.append(self._in_phase(phases[number], stream, offset, here))
            offset += here
            count -= here
        return joined(runs)

    def reach(self, stream: int) -> int:
        """Return the maximum number of places over which the records of a piece are spread."""
        shares = [pattern.counts / pattern.period for pattern in self._patterns]
        return max(
            int(order.reach(stream) / min(share[number] for share in shares if share[number])) + 1
            for number, order in enumerate(self._orders)
            if any(share[number] for share in shares)
        )

    def _in_phase(self, phase: _Phase, stream: int, offset: int, count: int) -> Run:
        pattern = phase.pattern
        places = np.arange(offset, offset + count) - phase.start
        members = pattern.member[places % pattern.period]
        counts = phase.counts_before(offset)
        joined = Run(*(np.empty(count, np.int64) for _ in Run._fields))
        for member in np.unique(members):
            here = np.flatnonzero(members == member)
            run = self._orders[member].at(stream, int(counts[member]), len(here))
            start = self._starts[member]
            shifted = (run.record + start, run.epoch, run.first + start, run.last + start)
            for array, values in zip(joined, shifted, strict=True):
                array[here] = values
        return joined


def _index(phases: list[_Phase], starts: list[int], orders: list[Any], position: int) -> int:
    """Return the index at a position. Takes no source, since workers unpickle the arguments."""
    phase = next(phase for phase in reversed(phases) if phase.start <= position)
    member, done = phase.at(int(position))
    return starts[member] + int(orders[member][done])
