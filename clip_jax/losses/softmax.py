"""InfoNCE: softmax over the global batch, both ways (Radford et al. 2021, figure 3)."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.errors import check_ranges
from clip_jax.losses.contrastive import Contrastive
from clip_jax.losses.pairs import Pairs, Statistics


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(Contrastive):
    """InfoNCE (CLIP): cross-entropy of images among all texts and of texts among all images."""

    label_smoothing: float = 0.0  # Share of the target that is spread over all unmasked pairs.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "SoftmaxConfig.", label_smoothing="[0, 1)")

    def summand(
        self, pairs: Pairs, scale: Float[Array, ""], bias: Float[Array, ""]
    ) -> Float[Array, "R C"]:
        """Return what `Statistics.summand_sum` adds up: the cosines, for label smoothing."""
        return pairs.cosine

    def losses(
        self, image: Statistics, text: Statistics, scale: Float[Array, ""]
    ) -> Float[Array, " B"]:
        """Return the loss of each pair from the statistics of its image and its text."""
        return (self._cross_entropy(image, scale) + self._cross_entropy(text, scale)) / 2

    def _cross_entropy(self, x: Statistics, scale: Float[Array, ""]) -> Float[Array, " B"]:
        loss = scale * (x.top - x.positive) + jnp.log(x.exp_sum)
        if self.label_smoothing:
            loss += self.label_smoothing * scale * (x.positive - x.summand_sum / x.count)
        return loss

    def gradient(
        self,
        pairs: Pairs,
        image: Statistics,
        text: Statistics,
        scale: Float[Array, ""],
        bias: Float[Array, ""],
    ) -> Float[Array, "R C"]:
        """Return d Σ losses / d logits on a block: predicted minus target probabilities."""
        image = jax.tree.map(lambda field: field[:, None], image)
        text = jax.tree.map(lambda field: field[None, :], text)
        predicted = jnp.exp(scale * (pairs.cosine - image.top)) / image.exp_sum
        predicted += jnp.exp(scale * (pairs.cosine - text.top)) / text.exp_sum
        target = 2 * (1 - self.label_smoothing) * pairs.positive
        if self.label_smoothing:
            even = 1 / image.count + 1 / text.count
            target += self.label_smoothing * jnp.where(pairs.valid, even, 0)
        return (predicted - target) / 2
