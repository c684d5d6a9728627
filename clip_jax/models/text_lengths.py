"""Texts of a batch in groups by length, each group padded to its own length.

Only for towers whose embedding of a text does not depend on its padding.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from clip_jax.errors import InputError, check_ranges

# Scope of the choice between groups by length and full padding in a compiled step.
SCOPE = "by_length"


@dataclass(frozen=True, kw_only=True)
class TextLengths:
    """Groups of texts by length, of fixed sizes on each device, so that short texts cost less.

    A device sorts its texts of a batch by length: the shortest are the first group. Texts that
    exceed their group's share are in the next longer group, so that no text is cut, and loss and
    gradients are those of full padding. If a group would have a text that is longer than the
    group's length, that batch is padded to the context length.
    """

    tokens: tuple[int, ...]  # Length of each group's texts in tokens, in ascending order.
    shares: tuple[float, ...]  # Share of each group in the texts of a batch; the sum is 1.

    def __post_init__(self) -> None:
        check_ranges(self, "text_lengths.", tokens="[2, inf)", shares="(0, 1]")
        ascend = list(self.tokens) == sorted(set(self.tokens))
        fits = len(self.tokens) == len(self.shares) and abs(sum(self.shares) - 1) < 1e-6
        if not (self.tokens and ascend and fits):
            raise InputError(
                f"text_lengths.tokens={self.tokens} must be in ascending order, and "
                f"text_lengths.shares={self.shares} must be one share for each, with sum 1."
            )

    @classmethod
    def propose(
        cls,
        used: Int[np.ndarray, " n"],
        *,
        texts: int,
        context_length: int,
        groups: int = 3,
        overflow: float = 1e-4,
    ) -> "TextLengths":
        """Return the groups with the fewest tokens for texts of lengths like those of a sample.

        Args:
          used: tokens of each text of the sample, begin and end of text included.
          texts: number of texts that a device encodes at once: those of a batch divided by batch
            shards and chunks. They are taken as drawn independently.
          context_length: the length of the last group, so that one of its texts always fits.
          groups: number of groups.
          overflow: probability that the texts of one device do not fit their groups, about.
        """
        from scipy import stats  # its import takes half a second

        lengths = [*range(8, context_length, 8), context_length]
        shares = (1 + (used[:, None] > lengths).sum(0)) / (1 + len(used))
        # Texts that exceed each length, with as many more as a device may have.
        longer = stats.binom.isf(overflow / groups, texts, shares)
        longer[-1] = 0

        def sizes(chosen: tuple[int, ...]) -> Int[np.ndarray, " groups"]:
            return -np.diff([texts, *longer[[*chosen]]]).astype(int)

        last = len(lengths) - 1
        shorter = itertools.combinations(range(last), min(groups - 1, last))
        best = min(((*x, last) for x in shorter), key=lambda x: sizes(x) @ np.take(lengths, x))
        kept = {lengths[i]: n for i, n in zip(best, sizes(best).tolist(), strict=True) if n}
        return cls(tokens=tuple(kept), shares=tuple(n / texts for n in kept.values()))

    def sizes(self, texts: int) -> list[int]:
        """Return how many of a device's `texts` each group has; longer groups have the rest."""
        ends = [math.floor(texts * share + 1e-6) for share in np.cumsum(self.shares)[:-1]]
        return np.diff([0, *ends, texts]).tolist()

    def mean(self, of: Callable[[int], float]) -> int:
        """Return the mean over texts of a number that depends on their length in tokens."""
        return round(sum(x * of(n) for n, x in zip(self.tokens, self.shares, strict=True)))

    def fit(self, used: Int[Array, "*N S b"]) -> Bool[Array, ""]:
        """Return whether all texts fit their groups, for the `b` texts of each of `S` devices, of
        whose tokens `used` are needed."""
        longest = np.repeat(self.tokens, self.sizes(used.shape[-1]))
        return (jnp.sort(used) <= longest).all()

    def embed(
        self,
        encode: Callable[[Int[Array, "b l"]], Float[Array, "b E"]],
        tokens: Int[Array, "B L"],
        used: Int[Array, " B"],
        shards: int,
    ) -> Float[Array, "B E"]:
        """Embed texts that `fit`, of whose tokens `used` are needed, by group on each device.

        `encode` embeds a group's token ids. A device has B / `shards` adjacent rows, all of which
        stay on it.
        """
        order = rearrange(used, "(S b) -> S b", S=shards).argsort()
        rows = rearrange(tokens, "(S b) L -> S b L", S=shards)
        rows = jnp.take_along_axis(rows, order[..., None], axis=1)
        parts, start = [], 0
        for length, size in zip(self.tokens, self.sizes(rows.shape[1]), strict=True):
            if size:
                group = rearrange(rows[:, start : start + size, :length], "S b l -> (S b) l")
                parts.append(rearrange(encode(group), "(S b) E -> S b E", S=shards))
            start += size
        embeddings = jnp.concatenate(parts, axis=1)
        embeddings = jnp.take_along_axis(embeddings, order.argsort()[..., None], axis=1)
        return rearrange(embeddings, "S b E -> (S b) E")
