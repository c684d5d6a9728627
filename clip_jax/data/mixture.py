"""Several sources in one stream by weight, each in its own shuffled order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from clip_jax.data.sources import Source
from clip_jax.data.sources.any import SingleConfig

_BLOCK = 4096  # samples in which the weights are kept exactly; their resolution
ENDLESS = 1 << 53  # positions


@dataclass(frozen=True, kw_only=True)
class MemberConfig:
    """One source of a mixture."""

    source: SingleConfig
    weight: float = 1.0  # its share of the samples, relative to the other members'


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """New weights from a global sample position on."""

    from_sample: int  # steps done × batch size
    weights: tuple[float, ...]  # one a member, in their order; 0: not read


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Members and weights. To change a running mixture, add a phase at the resume (and members at
    the end, with weight 0 for what is past): where each member stands follows from all phases."""

    members: tuple[MemberConfig, ...] = ()
    phases: tuple[PhaseConfig, ...] = ()

    def __post_init__(self) -> None:
        starts = [0, *(phase.from_sample for phase in self.phases)]
        if not self.members:
            raise ValueError("data.source.members is empty: a mixture needs at least one")
        if starts != sorted(starts):
            raise ValueError(f"data.source.phases start at {starts[1:]}; they must rise from 0")
        for weights in (self.weights, *(phase.weights for phase in self.phases)):
            if len(weights) != len(self.members) or min(weights) < 0 or not sum(weights) > 0:
                raise ValueError(
                    f"weights {weights} of data.source: needs {len(self.members)}, one a member, "
                    "none negative, not all 0"
                )

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the time before the first phase."""
        return tuple(member.weight for member in self.members)


class _Phase:
    """Which member each position has, in blocks that repeat, and how often it was had before."""

    def __init__(
        self, start: int, weights: Sequence[float], before: Int64[np.ndarray, " members"]
    ) -> None:
        self.start, self.before = start, before
        exact = np.asarray(weights, np.float64) / sum(weights) * _BLOCK
        self.counts = np.floor(exact).astype(np.int64)
        largest_rests = np.argsort(self.counts - exact, kind="stable")
        self.counts[largest_rests[: _BLOCK - self.counts.sum()]] += 1
        places = [(np.arange(count) + 0.5) / count for count in self.counts]
        order = np.argsort(np.concatenate(places), kind="stable")
        self.member = np.repeat(np.arange(len(weights)), self.counts)[order]
        self.rank = np.concatenate([np.arange(count) for count in self.counts])[order]

    def at(self, position: int) -> tuple[int, int]:
        """Member, and how many samples it gave before."""
        block, place = divmod(position - self.start, _BLOCK)
        member = int(self.member[place])
        done = self.before[member] + block * self.counts[member] + self.rank[place]
        return member, int(done)

    def given(self, position: int) -> Int64[np.ndarray, " members"]:
        """How many samples each member gave before a position."""
        block, place = divmod(position - self.start, _BLOCK)
        rest = np.bincount(self.member[:place], minlength=len(self.counts))
        return self.before + block * self.counts + rest


class MixtureSource:
    """All members' samples, one member after the other; `order` says which comes when."""

    def __init__(self, config: MixtureConfig, members: Sequence[Source]) -> None:
        self._members = members
        self._ends = np.cumsum([len(member) for member in members], dtype=np.int64)
        self._phases = [_Phase(0, config.weights, np.zeros(len(members), np.int64))]
        for phase in config.phases:
            given = self._phases[-1].given(phase.from_sample)
            self._phases.append(_Phase(phase.from_sample, phase.weights, given))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _find(self, index: int) -> tuple[int, int]:
        member = int(np.searchsorted(self._ends, index, side="right"))
        return member, index - (int(self._ends[member - 1]) if member else 0)

    def key(self, index: int) -> str:
        """Number of the member, and its key."""
        member, own = self._find(index)
        return f"{member}/{self._members[member].key(own)}"

    def load(
        self, index: int, rng: np.random.Generator
    ) -> tuple[bytes | UInt8[np.ndarray, "H W 3"], str]:
        """Get the member's sample."""
        member, own = self._find(index)
        return self._members[member].load(own, rng)

    def order(self, seed: int) -> Any:
        """An endless grain.MapDataset of indices: each member's epochs are permutations of it."""
        import grain

        orders = [
            grain.MapDataset.range(len(member)).seed((seed + number) % 2**32).shuffle().repeat()
            for number, member in enumerate(self._members)
        ]
        starts = [0, *self._ends.tolist()]
        return grain.MapDataset.range(ENDLESS).map(_Order(self._phases, starts, orders))


class _Order:
    """Index of a position. Travels to workers, as the source does not."""

    def __init__(self, phases: list[_Phase], starts: list[int], orders: list[Any]) -> None:
        self._phases, self._starts, self._orders = phases, starts, orders

    def __call__(self, position: int) -> int:
        phase = next(phase for phase in reversed(self._phases) if phase.start <= position)
        member, done = phase.at(int(position))
        return self._starts[member] + int(self._orders[member][done])
