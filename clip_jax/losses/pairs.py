"""Statistics of the rows and columns of the B × B logits, which define every contrastive loss.

A loss is written once, on `Statistics`; the forms only differ in how they gather them.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.errors import check_ranges
from clip_jax.losses.objective import Term

Form = Literal["auto", "dense", "blocked", "ring"]
Precision = Literal["default", "high", "highest"]

# The cosine of a masked pair. Finite: a block in which a whole row is masked gives no ∞ − ∞, and
# what it sums up vanishes as soon as it is merged with a block that holds a real cosine.
MASKED = -1e30


class Statistics(NamedTuple):
    """Statistics of each row (or each column) of the similarity matrix: one entry per row.

    Relative to one `top` all other fields are sums, so blocks join by `merge`, devices by `psum`.
    They are of cosines, not logits: at a scale of 100 a logit is rounded to 4e-6, while
    scale · (cosine − top) is not, and no fusion of the scaling can break a tie.
    """

    top: Array  # the largest cosine
    ties: Array  # how many cosines reach it
    positive: Array  # the cosine of the pair itself
    exp_sum: Array  # Σ exp(scale · (cosine − top))
    summand_sum: Array  # Σ of the loss's own `summand`
    count: Array  # how many pairs are not masked


class Pairs(NamedTuple):
    """A block of the similarity matrix: image rows × text columns."""

    cosine: Float[Array, "R C"]  # MASKED where not valid
    positive: Bool[Array, "R C"]  # image and text are one pair
    valid: Bool[Array, "R C"]  # pairs that take part in the loss


class Side(NamedTuple):
    """Embeddings of images or texts, with their identities."""

    features: Float[Array, "B E"]
    index: Int[Array, " B"]  # position in the global batch
    caption_ids: Int[Array, " B"] | None  # if set, other pairs with the same id are masked


@dataclass(frozen=True, kw_only=True)
class Pairwise(Term):
    """A loss of the similarity matrix, which a subclass defines and the forms compute."""

    needs_bias: ClassVar[bool] = False  # whether the loss takes the model's logit_bias

    form: Form = "auto"  # Form of the computation; all give the same loss, auto chooses by size.
    block_size: int = 512  # Number of texts compared at once by the forms blocked and ring.
    budget_mib: int = 256  # MiB that auto allows for logits (dense) or embeddings (blocked).
    precision: Precision = "highest"  # Matmul precision of similarities; TPUs' default is bfloat16.
    mask_same_caption: bool = False  # Exclude pairs with the same caption from the negatives.

    def __post_init__(self) -> None:
        check_ranges(
            self, f"{type(self).__name__}.", weight="[0, inf)", block_size="[1, inf)",
            budget_mib="[0, inf)",
        )  # fmt: skip

    def summand(
        self, pairs: Pairs, scale: Float[Array, ""], bias: Float[Array, ""]
    ) -> Float[Array, "R C"]:
        """Return what `Statistics.summand_sum` adds up over a row or column."""
        raise NotImplementedError

    def losses(
        self, image: Statistics, text: Statistics, scale: Float[Array, ""]
    ) -> Float[Array, " B"]:
        """Return the loss of each pair from the statistics of its image and its text."""
        raise NotImplementedError

    def gradient(
        self,
        pairs: Pairs,
        image: Statistics,
        text: Statistics,
        scale: Float[Array, ""],
        bias: Float[Array, ""],
    ) -> Float[Array, "R C"]:
        """Return d Σ losses / d logits on a block."""
        raise NotImplementedError


def compare(image: Side, text: Side, precision: Precision) -> Pairs:
    """Compare every image with every text."""
    cosine = jnp.einsum("RE,CE->RC", image.features, text.features, precision=precision)
    positive = image.index[:, None] == text.index[None, :]
    if image.caption_ids is None or text.caption_ids is None:
        return Pairs(cosine, positive, jnp.ones_like(positive))
    valid = positive | (image.caption_ids[:, None] != text.caption_ids[None, :])
    return Pairs(jnp.where(valid, cosine, MASKED), positive, valid)


def summarise(
    pairs: Pairs, summands: Float[Array, "R C"], scale: Float[Array, ""], axis: Literal[0, 1]
) -> Statistics:
    """Reduce a block over its columns (axis 1: one entry per image) or rows (axis 0: per text)."""
    # `top` cancels out of every loss; without its gradient the others stay exact at ties too.
    top = jax.lax.stop_gradient(pairs.cosine.max(axis))
    below = pairs.cosine - jnp.expand_dims(top, axis)
    dtype = below.dtype
    return Statistics(
        top=top,
        ties=(below == 0).sum(axis, dtype=dtype),
        positive=jnp.where(pairs.positive, pairs.cosine, 0).sum(axis),
        exp_sum=jnp.exp(scale * below).sum(axis),
        summand_sum=jnp.where(pairs.valid, summands, 0).sum(axis),
        count=pairs.valid.sum(axis, dtype=dtype),
    )


def nothing(size: int, dtype: jnp.dtype) -> Statistics:
    """Return the statistics of `size` rows before any pair is seen."""
    zero = jnp.zeros(size, dtype)
    return Statistics(zero + MASKED, zero, zero, zero, zero, zero)


def rebase(x: Statistics, top: Float[Array, " B"], scale: Float[Array, ""]) -> Statistics:
    """Express statistics relative to another, no smaller `top`."""
    ties = jnp.where(x.top == top, x.ties, 0)
    return x._replace(top=top, ties=ties, exp_sum=x.exp_sum * jnp.exp(scale * (x.top - top)))


def merge(x: Statistics, y: Statistics, scale: Float[Array, ""]) -> Statistics:
    """Join the statistics of the same rows over two disjoint sets of columns."""
    top = jnp.maximum(x.top, y.top)
    x, y = rebase(x, top, scale), rebase(y, top, scale)
    return Statistics(top, *(a + b for a, b in zip(x[1:], y[1:], strict=True)))


def accuracy(x: Statistics) -> Float[Array, " B"]:
    """Credit 1 where the pair's own cosine is the largest, 1/k where k of them tie for it.

    So a collapsed model (all cosines equal) scores 1/B, chance, and neither 0 nor 1.
    """
    return jnp.where(x.positive == x.top, 1 / x.ties, 0)
