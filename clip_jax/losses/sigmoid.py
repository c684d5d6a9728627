"""The loss of SigLIP: classify every image-text pair as matching or not (Zhai et al. 2023,
algorithm 1)."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.errors import check_ranges
from clip_jax.losses.contrastive import Contrastive
from clip_jax.losses.pairs import Pairs
from clip_jax.losses.sums import Statistics, SumOf, Sums


@dataclass(frozen=True, kw_only=True)
class SigmoidConfig(Contrastive):
    """Sigmoid loss (SigLIP): binary cross-entropy of all B² pairs, over B; needs a logit bias."""

    needs_bias: ClassVar[bool] = True
    takes_several: ClassVar[bool] = True

    label_smoothing: float = 0.0  # Label smoothing s: the targets 1 and 0 become 1 − s/2 and s/2.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "SigmoidConfig.", label_smoothing="[0, 1)")

    def sums(self, scale: Float[Array, ""], bias: Float[Array, ""]) -> Sums:
        """Return the sum of the losses of all pairs of an image."""

        def losses(pairs: Pairs) -> Float[Array, "R C"]:
            logits = scale * pairs.cosine + bias
            signed = jnp.where(pairs.positive, logits, -logits)
            losses = jax.nn.softplus(-signed) + self.label_smoothing / 2 * signed
            return losses if pairs.text_weight is None else losses * pairs.text_weight

        return {"losses": SumOf(losses)}

    def losses(
        self, image: Statistics, text: Statistics, scale: Float[Array, ""], bias: Float[Array, ""]
    ) -> Float[Array, " B"]:
        """Return the loss of each image with all texts; the text's statistics add nothing."""
        return image["losses"]

    def gradient(
        self,
        pairs: Pairs,
        image: Statistics,
        text: Statistics,
        scale: Float[Array, ""],
        bias: Float[Array, ""],
    ) -> Float[Array, "R C"]:
        """Return d Σ losses / d logits on a block."""
        logits = scale * pairs.cosine + bias
        sign = jnp.where(pairs.positive, 1.0, -1.0)
        gradient = sign * (self.label_smoothing / 2 - jax.nn.sigmoid(-sign * logits))
        return jnp.where(pairs.valid, gradient, 0)
