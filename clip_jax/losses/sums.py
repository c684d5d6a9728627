"""What a contrastive loss accumulates over the rows and columns of the similarity matrix.

The matrix comes in blocks. A loss declares maxima and sums by name, and its statistics of two
blocks of the same rows join: the larger maxima, and the sums, after both are relative to them. So
the loss never sees how the matrix was divided.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.losses.pairs import MASKED, Pairs, Side

Axis = Literal[0, 1]  # 1: one statistic for each row (image), 0: for each column (text)
Values = Callable[[Pairs], Float[Array, "R C"]]
Statistics = dict[str, Any]  # by name: [B], or a tree of such arrays
NEAR = 1e-6  # relative distance of values that rounding alone may separate


class Block(NamedTuple):
    """Pairs that are reduced over one axis."""

    pairs: Pairs
    values: Mapping[str, Any]  # what each entry evaluated, by its name
    tops: Mapping[str, Float[Array, "..."]]  # maximum of each row [R, 1] or column [1, C]
    below: Mapping[str, Float[Array, "R C"]]  # values less that maximum


@dataclass(frozen=True)
class Max:
    """The largest of `values`, which are `MASKED` for pairs that do not take part.

    If none takes part, the maximum is `MASKED`, and sums relative to it have no meaning.
    With `has_gradient`, the values that reach it share its gradient, as in JAX. Without, it counts
    as a constant. That is exact only if the loss does not depend on it, as where a maximum is
    subtracted to keep exponentials from overflowing, and added again.
    """

    values: Values
    has_gradient: bool = False

    def start(self, zero: Float[Array, " B"]) -> Float[Array, " B"]:
        """Return the statistic before any pair is seen."""
        return zero + MASKED


class Sum:
    """A sum over a row or column, possibly relative to maxima; the base of those below."""

    def evaluate(self, pairs: Pairs) -> Any:
        """Return what `summands` needs of each pair, whatever the axis."""
        return None

    def start(self, zero: Float[Array, " B"]) -> Any:
        """Return the statistic before any pair is seen."""
        return zero

    def summands(self, name: str, block: Block) -> Any:
        """Return what is added up, a tree of [R, C]."""
        raise NotImplementedError

    def rebase(self, total: Any, old: Statistics, new: Statistics) -> Any:
        """Express a sum relative to the maxima in `old` relative to no smaller ones, in `new`."""
        return total


@dataclass(frozen=True)
class SumOf(Sum):
    """The sum of `values` over the valid pairs, or over the positive ones."""

    values: Values
    among: Literal["valid", "positive"] = "valid"

    def evaluate(self, pairs: Pairs) -> Float[Array, "R C"]:
        return self.values(pairs)

    def summands(self, name: str, block: Block) -> Float[Array, "R C"]:
        return jnp.where(getattr(block.pairs, self.among), block.values[name], 0)


@dataclass(frozen=True)
class Count(Sum):
    """The number of valid or of positive pairs."""

    among: Literal["valid", "positive"] = "valid"

    def summands(self, name: str, block: Block) -> Array:
        return getattr(block.pairs, self.among)


@dataclass(frozen=True)
class Ties(Sum):
    """How many pairs, or positive pairs, reach the maximum `of`, up to a relative `distance`."""

    of: str
    among: Literal["valid", "positive"] = "valid"
    distance: float = 0.0

    def summands(self, name: str, block: Block) -> Array:
        if self.distance:
            reached = _is_near(block.below[self.of], block.tops[self.of], self.distance)
        else:
            reached = block.below[self.of] == 0
        return reached & block.pairs.positive if self.among == "positive" else reached

    def rebase(self, total: Array, old: Statistics, new: Statistics) -> Array:
        if self.distance:
            still = _is_near(old[self.of] - new[self.of], new[self.of], self.distance)
        else:
            still = old[self.of] == new[self.of]
        return jnp.where(still, total, 0)


@dataclass(frozen=True)
class ExpSum(Sum):
    """Σ exp(factor · (value − maximum)) · times, of the values of the `Max` named `of`."""

    of: str
    factor: Float[Array, ""] | float = 1.0
    times: Values | None = None  # None: 1

    def evaluate(self, pairs: Pairs) -> Any:
        return None if self.times is None else self.times(pairs)

    def summands(self, name: str, block: Block) -> Float[Array, "R C"]:
        exponentials = jnp.exp(self.factor * block.below[self.of])
        return exponentials if self.times is None else exponentials * block.values[name]

    def rebase(self, total: Array, old: Statistics, new: Statistics) -> Array:
        return total * jnp.exp(self.factor * (old[self.of] - new[self.of]))


Sums = dict[str, Max | Sum]


def common_sums(
    scale: Float[Array, ""], one_to_one: bool, distance: float = 0.0, weighted: bool = False
) -> Sums:
    """Return the statistics that every loss has besides its own; see `Contrastive`.

    Pairs tie for the largest cosine if they are equal to it, up to a relative `distance`.

    They are of cosines, not logits: at a scale of 100 a logit is rounded to 4e-6, while
    scale · (cosine − top) is not, and no fusion of the scaling can break a tie.
    """
    sums: Sums = {
        "top": Max(_cosine),
        "ties": Ties("top", distance=distance),
        "positive": SumOf(_cosine, among="positive"),
        "exp_sum": ExpSum("top", scale),
        "count": Count(),
    }
    if one_to_one:
        return sums
    hits = Ties("top", among="positive", distance=distance)
    sums |= {"positives": Count("positive"), "hits": hits}
    return sums | ({"text_weights": SumOf(_text_weight, "positive")} if weighted else {})


def weighted(values: Float[Array, " C"], text: Statistics, images: int) -> Float[Array, " C"]:
    """Multiply values of texts by their weights, if they have any (`Side.weight`), so that the mean
    of the result is Σ weight · value / `images`."""
    if "text_weights" not in text:
        return values
    weights = text["text_weights"] / jnp.maximum(text["positives"], 1)  # one for each positive pair
    return values * weights * (len(values) / images)


def accuracy(x: Statistics, distance: float = 0.0) -> Float[Array, " B"]:
    """Credit 1 where a positive pair's cosine is the largest, 1/k where k pairs tie for it.

    So a collapsed model (all cosines equal) scores 1/B, chance, and neither 0 nor 1.
    """
    if "hits" in x:
        return x["hits"] / x["ties"]
    is_top = _is_near(x["positive"] - x["top"], x["top"], distance)
    return jnp.where(is_top, 1 / x["ties"], 0)


def with_ties(sums: Sums) -> Sums:
    """Add how many values share the gradient of each maximum that has one."""
    shared = [name for name, entry in maxima(sums).items() if entry.has_gradient]
    return sums | {f"{name}/ties": Ties(name, distance=NEAR) for name in shared}


def maxima(sums: Sums) -> dict[str, Max]:
    """Return the entries that are maxima."""
    return {name: entry for name, entry in sums.items() if isinstance(entry, Max)}


def totals(sums: Sums) -> dict[str, Sum]:
    """Return the entries that are sums."""
    return {name: entry for name, entry in sums.items() if isinstance(entry, Sum)}


def evaluate(sums: Sums, pairs: Pairs) -> dict[str, Any]:
    """Return what each entry needs of a block's pairs, for both axes."""
    values = {name: entry.values(pairs) for name, entry in maxima(sums).items()}
    return values | {name: entry.evaluate(pairs) for name, entry in totals(sums).items()}


def summarise(sums: Sums, pairs: Pairs, values: Mapping[str, Any], axis: Axis) -> Statistics:
    """Reduce a block over its columns (axis 1: one entry per image) or rows (axis 0: per text)."""
    tops = {}
    for name, entry in maxima(sums).items():
        top = values[name].max(axis)
        # One that cancels out of the loss: without its gradient the others stay exact at ties too.
        tops[name] = top if entry.has_gradient else jax.lax.stop_gradient(top)
    return tops | _summed(sums, pairs, values, tops, axis)


def contribution(sums: Sums, pairs: Pairs, total: Statistics, axis: Axis) -> Statistics:
    """Return what a block adds to the statistics of all blocks, to be differentiated.

    A maximum that has a gradient is the mean of the values that reach it.
    """
    values, tops = evaluate(sums, pairs), {name: total[name] for name in maxima(sums)}
    shares = {}
    for name, entry in maxima(sums).items():
        if entry.has_gradient:
            top = jnp.expand_dims(tops[name], axis)
            reached = _is_near(values[name] - top, top, NEAR)
            shares[name] = jnp.where(reached, values[name], 0).sum(axis) / total[f"{name}/ties"]
    return shares | _summed(sums, pairs, values, tops, axis)


def start(sums: Sums, side: Side) -> Statistics:
    """Return the statistics of images or texts before any pair is seen."""
    zero = jnp.zeros(len(side.ids), side.features.dtype)
    return {name: entry.start(zero) for name, entry in sums.items()}


def rebase(sums: Sums, x: Statistics, tops: Statistics) -> Statistics:
    """Express statistics relative to other, no smaller maxima."""
    return tops | {name: entry.rebase(x[name], x, tops) for name, entry in totals(sums).items()}


def merge(sums: Sums, x: Statistics, y: Statistics) -> Statistics:
    """Join the statistics of the same rows over two disjoint sets of columns."""
    tops = {name: jnp.maximum(x[name], y[name]) for name in maxima(sums)}
    x, y = rebase(sums, x, tops), rebase(sums, y, tops)
    return tops | {name: jax.tree.map(jnp.add, x[name], y[name]) for name in totals(sums)}


def merge_all(sums: Sums, x: Statistics) -> Statistics:
    """Join statistics [N, B] of the same rows over N disjoint sets of columns."""
    tops = {name: x[name].max(0) for name in maxima(sums)}
    x = rebase(sums, x, tops)
    return tops | {name: jax.tree.map(lambda a: a.sum(0), x[name]) for name in totals(sums)}


def _text_weight(pairs: Pairs) -> Float[Array, "R C"]:
    assert pairs.text_weight is not None
    return jnp.broadcast_to(pairs.text_weight, pairs.cosine.shape)


def _cosine(pairs: Pairs) -> Float[Array, "R C"]:
    return pairs.cosine


def _summed(
    sums: Sums, pairs: Pairs, values: Mapping[str, Any], tops: Statistics, axis: Axis
) -> Statistics:
    """Return the sums of a block relative to the maxima `tops`."""
    expanded = {name: jnp.expand_dims(top, axis) for name, top in tops.items()}
    below = {name: values[name] - top for name, top in expanded.items()}
    block = Block(pairs, values, expanded, below)

    def add_up(x: Array) -> Array:
        return x.sum(axis, dtype=pairs.cosine.dtype)

    return {
        name: jax.tree.map(add_up, entry.summands(name, block))
        for name, entry in totals(sums).items()
    }


def _is_near(below: Array, top: Array, distance: float) -> Array:
    return below >= -distance * jnp.maximum(1, jnp.abs(top))
