"""Matryoshka embeddings: one loss of several widths (Kusupati et al. 2022, arXiv:2205.13147).

A width is a number of first channels, which are normalised on their own. The statistics of each
width have the names of those of all channels, after the width and a colon.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Array, Float

from clip_jax.losses.pairs import Pairs
from clip_jax.losses.sums import Block, Max, Statistics, Sum, Sums, Values

SEPARATOR = ":"


@dataclass(frozen=True)
class SumAtWidth(Sum):
    """A sum of the loss, for the cosines of one width."""

    entry: Sum
    width: int
    index: int  # of the width among those of the loss

    def evaluate(self, pairs: Pairs) -> Any:
        return self.entry.evaluate(_at_index(pairs, self.index))

    def start(self, zero: Float[Array, " B"]) -> Any:
        return self.entry.start(zero)

    def summands(self, name: str, block: Block) -> Any:
        pairs = _at_index(block.pairs, self.index)
        others = (at_width(x, self.width) for x in block[1:])
        return self.entry.summands(name.partition(SEPARATOR)[2], Block(pairs, *others))

    def rebase(self, total: Any, old: Statistics, new: Statistics) -> Any:
        return self.entry.rebase(total, at_width(old, self.width), at_width(new, self.width))


def of_widths(sums: Sums, widths: tuple[int, ...]) -> Sums:
    """Return these statistics for each width."""
    return {
        f"{width}{SEPARATOR}{name}": _entry_at(entry, width, index)
        for index, width in enumerate(widths)
        for name, entry in sums.items()
    }


def at_width(x: Mapping[str, Any], width: int | None) -> dict[str, Any]:
    """Return what belongs to one width, by the names of all channels; None: all channels."""
    start = "" if width is None else f"{width}{SEPARATOR}"
    names = {name: name.removeprefix(start) for name in x if name.startswith(start)}
    return {own: x[name] for name, own in names.items() if SEPARATOR not in own}


def _entry_at(entry: Max | Sum, width: int, index: int) -> Max | Sum:
    if isinstance(entry, Sum):
        return SumAtWidth(entry, width, index)
    values: Values = entry.values
    return Max(lambda pairs: values(_at_index(pairs, index)), entry.has_gradient)


def _at_index(pairs: Pairs, index: int) -> Pairs:
    return pairs._replace(cosine=pairs.prefixes[index])
