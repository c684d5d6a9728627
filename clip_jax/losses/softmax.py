"""InfoNCE: softmax over the global batch, both ways (Radford et al. 2021, figure 3)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from clip_jax.errors import check_ranges
from clip_jax.losses.contrastive import Contrastive
from clip_jax.losses.pairs import Pairs
from clip_jax.losses.sums import Statistics, SumOf, Sums, weighted


@dataclass(frozen=True, kw_only=True)
class SoftmaxConfig(Contrastive):
    """InfoNCE (CLIP): cross-entropy of images among all texts and of texts among all images."""

    takes_several: ClassVar[bool] = True

    label_smoothing: float = 0.0  # Share of the target that is spread over all unmasked pairs.

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "SoftmaxConfig.", label_smoothing="[0, 1)")

    def sums(self, scale: Float[Array, ""], bias: Float[Array, ""]) -> Sums:
        """Return the sum of the cosines, for label smoothing."""
        return {"cosines": SumOf(lambda pairs: pairs.cosine)}

    def losses(
        self, image: Statistics, text: Statistics, scale: Float[Array, ""], bias: Float[Array, ""]
    ) -> Any:
        """Return the loss of each pair, or halves of those of each image and each text."""
        of_image, of_text = self._cross_entropy(image, scale), self._cross_entropy(text, scale)
        if "positives" in image:
            return of_image / 2, weighted(of_text, text, len(of_image)) / 2
        return (of_image + of_text) / 2

    def _cross_entropy(self, x: Statistics, scale: Float[Array, ""]) -> Float[Array, " B"]:
        """Return the cross-entropy with a target that the positive pairs share equally."""
        positive = x["positive"]
        if "positives" in x:
            positive /= jnp.maximum(x["positives"], 1)
        loss = scale * (x["top"] - positive) + jnp.log(x["exp_sum"])
        if self.label_smoothing:
            mean = x["cosines"] / jnp.maximum(x["count"], 1)
            loss += self.label_smoothing * scale * (positive - mean)
        return jnp.where(x["positives"] > 0, loss, 0) if "positives" in x else loss

    def gradient(
        self,
        pairs: Pairs,
        image: Statistics,
        text: Statistics,
        scale: Float[Array, ""],
        bias: Float[Array, ""],
    ) -> Float[Array, "R C"]:
        """Return d Σ losses / d logits on a block: predicted minus target probabilities."""
        image = jax.tree.map(lambda x: x[:, None], image)
        text = jax.tree.map(lambda x: x[None, :], text)
        predicted = jnp.exp(scale * (pairs.cosine - image["top"])) / image["exp_sum"]
        predicted += jnp.exp(scale * (pairs.cosine - text["top"])) / text["exp_sum"]
        target = 2 * (1 - self.label_smoothing) * pairs.positive
        if self.label_smoothing:
            even = 1 / image["count"] + 1 / text["count"]
            target += self.label_smoothing * jnp.where(pairs.valid, even, 0)
        return (predicted - target) / 2
