"""Hard-negative noise-contrastive loss, HN-NCE (Radenovic et al. 2023, arXiv:2301.02280)."""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.errors import check_ranges
from clip_jax.losses import Contrastive
from clip_jax.losses.pairs import MASKED, Pairs
from clip_jax.losses.sums import ExpSum, Max, Statistics, Sums


@dataclass(frozen=True, kw_only=True)
class HardNegativeConfig(Contrastive):
    """HN-NCE: cross-entropy in which negatives that are closer weigh more."""

    name: ClassVar[str] = "hard_negatives"

    alpha: float = 1.0  # Weight of the pair itself in the normalisation.
    beta: float = 0.25  # Concentration of the weights on close negatives; 0: equal weights.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "HardNegativeConfig.", alpha="(0, 1]", beta="[0, inf)")

    def sums(self, scale: Float[Array, ""], bias: Float[Array, ""]) -> Sums:
        """Return Σ exp(β · logit) and Σ exp((1 + β) · logit) over the negatives."""
        return {
            "hardest": Max(negatives),
            "weights": ExpSum("hardest", self.beta * scale),
            "weighted": ExpSum("hardest", (1 + self.beta) * scale),
        }

    def losses(
        self,
        image: Statistics,
        text: Statistics,
        scale: Float[Array, ""],
        bias: Float[Array, ""],
    ) -> Float[Array, " B"]:
        """Return the mean over both directions."""
        return (self._cross_entropy(image, scale) + self._cross_entropy(text, scale)) / 2

    def _cross_entropy(self, x: Statistics, scale: Float[Array, ""]) -> Float[Array, " B"]:
        share = jnp.log((x["count"] - 1) * x["weighted"] / x["weights"])
        hardest = scale * (x["hardest"] - x["positive"]) + share
        return jnp.logaddexp(jnp.log(self.alpha), hardest)


def negatives(pairs: Pairs) -> Float[Array, "R C"]:
    """Return the cosines of all pairs but the positive ones."""
    return jnp.where(pairs.positive, MASKED, pairs.cosine)
