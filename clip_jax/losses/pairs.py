"""Statistics of the rows and columns of the B × B logits, which define every contrastive loss.

A loss is written once, on `Statistics`; the forms only differ in how they gather them.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.errors import check_ranges
from clip_jax.losses.objective import Term
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.inputs import Input, LabelInput, TextInput

Form = Literal["auto", "dense", "blocked", "ring"]
Precision = Literal["default", "high", "highest"]
Captions = Literal["true", "synthetic", "both"]
TEXTS = {"true": {"text": "text"}, "synthetic": {"synthetic": "text:synthetic"}}
TEXTS["both"] = TEXTS["true"] | TEXTS["synthetic"]

# The cosine of a masked pair. Finite: a block in which a whole row is masked gives no ∞ − ∞, and
# what it sums up vanishes as soon as it is merged with a block that holds a real cosine.
MASKED = -1e30


class Statistics(NamedTuple):
    """Statistics of each row (or each column) of the similarity matrix: one entry per row.

    Relative to the first two fields, which are maxima, all others are sums, so blocks join by
    `merge`. They are of cosines, not logits: at a scale of 100 a logit is rounded to 4e-6, while
    scale · (cosine − top) is not, and no fusion of the scaling can break a tie.
    """

    top: Array  # the largest cosine
    teacher_tops: tuple[Array, ...]  # the largest logit of each teacher
    ties: Array  # how many cosines reach it
    positive: Array  # the cosine of the pair itself
    exp_sum: Array  # Σ exp(scale · (cosine − top))
    summand_sum: Array  # Σ of the loss's own `summand`
    count: Array  # how many pairs are not masked
    # Of each teacher, with w = exp(logit − teacher_top): Σ w, and Σ w · (cosine − top).
    teacher_sums: tuple[tuple[Array, Array], ...]


class Pairs(NamedTuple):
    """A block of the similarity matrix: image rows × text columns."""

    cosine: Float[Array, "R C"]  # MASKED where not valid
    positive: Bool[Array, "R C"]  # image and text are one pair
    valid: Bool[Array, "R C"]  # pairs that take part in the loss
    teachers: tuple[Float[Array, "R C"], ...] = ()  # logits of each teacher


class Side(NamedTuple):
    """Embeddings of images or texts, with their identities."""

    features: Float[Array, "B E"]
    index: Int[Array, " B"]  # position in the global batch
    caption_ids: Int[Array, " B"] | None  # if set, other pairs with the same id are masked
    # Embeddings of the teachers, of any widths. The images' are multiplied by the teacher's scale,
    # and a bias is one more channel (1 for texts), so that logits are one product.
    teachers: tuple[Float[Array, "B _"], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pairwise(Term):
    """A loss of the similarity matrix, which a subclass defines and the forms compute."""

    needs_bias: ClassVar[bool] = False  # whether the loss takes the model's logit_bias
    teachers: ClassVar[tuple[Any, ...]] = ()  # models whose similarities are targets

    # Captions that images are compared with. both: the sum of a loss with true and a loss with
    # synthetic captions; metrics are those of the true ones.
    captions: Captions = "true"
    form: Form = "auto"  # Form of the computation; all give the same loss, auto chooses by size.
    block_size: int = 512  # Number of texts compared at once by the forms blocked and ring.
    budget_mib: int = 256  # MiB that auto allows for logits (dense) or embeddings (blocked).
    precision: Precision = "highest"  # Matmul precision of similarities; TPUs' default is bfloat16.
    # Exclude pairs with the same caption from the negatives, and from the teachers' targets.
    mask_same_caption: bool = False
    mask_same_class: bool = False  # Exclude pairs of one class instead; needs class folders.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            f"{type(self).__name__}.",
            weight="[0, inf)",
            block_size="[1, inf)",
            budget_mib="[0, inf)",
        )

    @property
    def texts(self) -> dict[str, str]:
        """The inputs with the captions of the loss, and the names of their outputs."""
        return TEXTS[self.captions]

    @property
    def needs(self) -> tuple[str, ...]:
        """The embeddings of synthetic captions, if the loss compares them."""
        return tuple(name for name in self.texts.values() if name != "text")

    def reads(self, model: CLIPConfig) -> dict[str, Input]:
        """Return the synthetic captions and the classes, if the loss compares them."""
        inputs: dict[str, Input] = {"class": LabelInput()} if self.mask_same_class else {}
        return inputs | {
            name: TextInput(model.text, synthetic=True) for name in self.texts if name != "text"
        }

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
    teachers = tuple(
        jnp.einsum("RD,CD->RC", a, b, precision=precision)
        for a, b in zip(image.teachers, text.teachers, strict=True)
    )
    if image.caption_ids is None or text.caption_ids is None:
        return Pairs(cosine, positive, jnp.ones_like(positive), teachers)
    valid = positive | (image.caption_ids[:, None] != text.caption_ids[None, :])
    cosine, *teachers = (jnp.where(valid, x, MASKED) for x in (cosine, *teachers))
    return Pairs(cosine, positive, valid, tuple(teachers))


def summarise(
    pairs: Pairs, summands: Float[Array, "R C"], scale: Float[Array, ""], axis: Literal[0, 1]
) -> Statistics:
    """Reduce a block over its columns (axis 1: one entry per image) or rows (axis 0: per text)."""
    # `top` cancels out of every loss; without its gradient the others stay exact at ties too.
    top = jax.lax.stop_gradient(pairs.cosine.max(axis))
    below = pairs.cosine - jnp.expand_dims(top, axis)
    dtype = below.dtype
    tops = tuple(logits.max(axis) for logits in pairs.teachers)
    weights = [
        jnp.exp(logits - jnp.expand_dims(top, axis))
        for logits, top in zip(pairs.teachers, tops, strict=True)
    ]
    return Statistics(
        top=top,
        teacher_tops=tops,
        ties=(below == 0).sum(axis, dtype=dtype),
        positive=jnp.where(pairs.positive, pairs.cosine, 0).sum(axis),
        exp_sum=jnp.exp(scale * below).sum(axis),
        summand_sum=jnp.where(pairs.valid, summands, 0).sum(axis),
        count=pairs.valid.sum(axis, dtype=dtype),
        teacher_sums=tuple((w.sum(axis), (w * below).sum(axis)) for w in weights),
    )


def nothing(side: Side) -> Statistics:
    """Return the statistics of images or texts before any pair is seen."""
    zero = jnp.zeros(len(side.index), side.features.dtype)
    tops, sums = (zero + MASKED,) * len(side.teachers), ((zero, zero),) * len(side.teachers)
    return Statistics(zero + MASKED, tops, zero, zero, zero, zero, zero, sums)


def rebase(x: Statistics, tops: tuple[Any, ...], scale: Float[Array, ""]) -> Statistics:
    """Express statistics relative to other, no smaller `top` and `teacher_tops`."""
    top, teacher_tops = tops
    ties = jnp.where(x.top == top, x.ties, 0)
    factors = [jnp.exp(old - new) for old, new in zip(x.teacher_tops, teacher_tops, strict=True)]
    sums = tuple(
        (factor * total, factor * (below + total * (x.top - top)))
        for factor, (total, below) in zip(factors, x.teacher_sums, strict=True)
    )
    exp_sum = x.exp_sum * jnp.exp(scale * (x.top - top))
    return Statistics(top, teacher_tops, ties, x.positive, exp_sum, x.summand_sum, x.count, sums)


def merge(x: Statistics, y: Statistics, scale: Float[Array, ""]) -> Statistics:
    """Join the statistics of the same rows over two disjoint sets of columns."""
    tops = jax.tree.map(jnp.maximum, x[:2], y[:2])
    x, y = rebase(x, tops, scale), rebase(y, tops, scale)
    return Statistics(*tops, *jax.tree.map(jnp.add, x[2:], y[2:]))


def accuracy(x: Statistics) -> Float[Array, " B"]:
    """Credit 1 where the pair's own cosine is the largest, 1/k where k of them tie for it.

    So a collapsed model (all cosines equal) scores 1/B, chance, and neither 0 nor 1.
    """
    return jnp.where(x.positive == x.top, 1 / x.ties, 0)
