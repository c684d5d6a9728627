"""A block of the similarity matrix of images and texts, and what it is computed from."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from clip_jax.models.clip import l2_normalize

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


class Side(NamedTuple):
    """Embeddings of images or texts, with their identities."""

    features: Float[Array, "B E"]
    ids: Int[Array, " B"]  # an image and a text of the same id are a positive pair
    caption_ids: Int[Array, " B"] | None  # if set, other pairs with the same id are masked
    # Embeddings of the teachers, of any widths. The images' are multiplied by the teacher's scale,
    # and a bias is one more channel (1 for texts), so that logits are one product.
    teachers: tuple[Float[Array, "B _"], ...] = ()
    inputs: Mapping[str, Array] = {}  # more of each image or text, [B, ...], such as its weight


def compare(
    image: Side, text: Side, precision: Precision = "highest", widths: tuple[int, ...] = ()
) -> Pairs:
    """Compare every image with every text."""
    cosine = _products(image.features, text.features, precision)
    positive = image.ids[:, None] == text.ids[None, :]
    teachers = tuple(
        _products(a, b, precision) for a, b in zip(image.teachers, text.teachers, strict=True)
    )
    prefixes = tuple(
        _products(
            l2_normalize(image.features[:, :width]),
            l2_normalize(text.features[:, :width]),
            precision,
        )
        for width in widths
    )
    valid = jnp.ones_like(positive)
    if image.caption_ids is not None and text.caption_ids is not None:
        valid = positive | (image.caption_ids[:, None] != text.caption_ids[None, :])
        cosine = jnp.where(valid, cosine, MASKED)
        teachers = tuple(jnp.where(valid, x, MASKED) for x in teachers)
        prefixes = tuple(jnp.where(valid, x, MASKED) for x in prefixes)
    return Pairs(cosine, positive, valid, teachers, prefixes, image.inputs, text.inputs)


def _products(
    image: Float[Array, "R E"], text: Float[Array, "C E"], precision: Precision
) -> Float[Array, "R C"]:
    return jnp.einsum("RE,CE->RC", image, text, precision=precision)
