"""A block of the similarity matrix of images and texts, and what it is computed from."""

import functools
import itertools
import operator
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.models.clip import inverse_norm

Precision = Literal["default", "high", "highest"]

# The cosine of a masked pair. Finite: a block in which a whole row is masked gives no ∞ − ∞, and
# what it sums up vanishes as soon as it is merged with a block that holds a real cosine.
MASKED = -1e30


class Pairs(NamedTuple):
    """A block of the similarity matrix: image rows × text columns."""

    cosine: Float[Array, "R C"]  # MASKED where not valid
    positive: Bool[Array, "R C"]  # image and text match; a row or column may have several, or none
    valid: Bool[Array, "R C"]  # pairs that take part in the loss
    teachers: tuple[Float[Array, "R C"], ...] = ()  # logits of each teacher
    # Cosines of the embeddings' first channels, for each of the loss's `widths`.
    prefixes: tuple[Float[Array, "R C"], ...] = ()
    image: Mapping[str, Array] = {}  # `Side.inputs` of the rows, [R, ...]
    text: Mapping[str, Array] = {}  # `Side.inputs` of the columns, [C, ...]
    text_weight: Float[Array, " C"] | None = None  # `Side.weight` of the columns


class Side(NamedTuple):
    """Embeddings of images or texts, with their identities."""

    features: Float[Array, "B E"]
    ids: Int[Array, " B"]  # an image and a text of the same id are a positive pair
    # If set, other pairs with the same id are masked. An image may have those of several captions.
    caption_ids: Int[Array, " B"] | Int[Array, "B K"] | None
    # Embeddings of the teachers, of any widths. The images' are multiplied by the teacher's scale,
    # and a bias is one more channel (1 for texts), so that logits are one product.
    teachers: tuple[Float[Array, "B _"], ...] = ()
    inputs: Mapping[str, Array] = {}  # more of each image or text, [B, ...], such as its weight
    # Of texts: factors on their losses. A text of weight 0 takes no part. None: 1 each.
    weight: Float[Array, " B"] | None = None


def compare(
    image: Side, text: Side, precision: Precision = "highest", widths: tuple[int, ...] = ()
) -> Pairs:
    """Compare every image with every text; `widths` are numbers of first channels, ascending."""
    *prefixes, cosine = _cosines(image.features, text.features, precision, widths)
    positive = image.ids[:, None] == text.ids[None, :]
    teachers = tuple(
        _products(a, b, precision) for a, b in zip(image.teachers, text.teachers, strict=True)
    )
    valid = jnp.ones_like(positive)
    if image.caption_ids is not None and text.caption_ids is not None:
        of_image = image.caption_ids.reshape(len(image.ids), -1)
        is_other = (of_image[:, i, None] != text.caption_ids for i in range(of_image.shape[1]))
        valid = positive | functools.reduce(operator.and_, is_other)
    if text.weight is not None:
        positive, valid = (x & (text.weight > 0) for x in (positive, valid))
    if image.caption_ids is not None or text.weight is not None:
        cosine = jnp.where(valid, cosine, MASKED)
        teachers = tuple(jnp.where(valid, x, MASKED) for x in teachers)
        prefixes = [jnp.where(valid, x, MASKED) for x in prefixes]
    pairs = Pairs(cosine, positive, valid, teachers, tuple(prefixes), image.inputs, text.inputs)
    return pairs._replace(text_weight=text.weight)


def _cosines(
    image: Float[Array, "R E"],
    text: Float[Array, "C E"],
    precision: Precision,
    widths: tuple[int, ...],
) -> list[Float[Array, "R C"]]:
    """Return the cosines of the first channels, for each width, and of all channels.

    Products of prefixes are running sums, so that each channel is multiplied once. XLA may compute
    the cosine of a prefix twice, with different rounding.
    """
    cosines, products = [], jnp.float32(0)
    for start, end in itertools.pairwise((0, *widths, image.shape[1])):
        products += _products(image[:, start:end], text[:, start:end], precision)
        if end in widths:
            of_image, of_text = (inverse_norm(x[:, :end]) for x in (image, text))
            cosines.append(products * of_image * of_text.T)
        else:
            cosines.append(products)  # complete embeddings have unit length
    return cosines


def _products(
    image: Float[Array, "R E"], text: Float[Array, "C E"], precision: Precision
) -> Float[Array, "R C"]:
    return jnp.einsum("RE,CE->RC", image, text, precision=precision)
