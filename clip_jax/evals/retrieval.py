"""Retrieval both ways (CLIP paper, table 13): recall@k and median rank, in blocks.

The rank of a query is 1 plus the number of wrong candidates that are at least as similar as its
best right one, so ties count against the model: features that are all the same retrieve nothing.
The similarity matrix is never whole: texts go through in chunks, images in blocks of a scan, and
one product serves both directions.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from clip_jax import sharding
from clip_jax.errors import InputError

RECALL_AT = (1, 5, 10)
_TEXTS = 4_096  # texts of a chunk on each batch shard
_IMAGES = 1_024  # images of a block


def ranks(
    image_features: Float[np.ndarray, "images E"],
    text_features: Float[np.ndarray, "texts E"],
    image_of_text: Int[np.ndarray, " owners"],
    mesh: Mesh,
) -> tuple[Int[np.ndarray, " texts"], Int[np.ndarray, " images"]]:
    """Rank the right image of every text, and the best caption of every image; 1 is the best.

    Features are unit vectors. Raises InputError for an index out of range and for an image without
    a caption.
    """
    num_images, num_texts = len(image_features), len(text_features)
    if len(image_of_text) != num_texts:
        raise ValueError(f"{num_texts} texts need as many image indices, not {len(image_of_text)}.")
    if num_texts and not 0 <= image_of_text.min() <= image_of_text.max() < num_images:
        raise ValueError(f"image_of_text must lie in 0 to {num_images - 1}, the images given.")
    captioned = np.bincount(image_of_text, minlength=num_images)
    if not captioned.all():
        raise InputError(f"image {np.argmin(captioned)} has no caption; leave such images out.")

    shards = sharding.batch_shards(mesh)
    chunk = min(_TEXTS, -(-num_texts // shards)) * shards
    starts = range(0, num_texts, chunk)
    split, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

    def place(rows: np.ndarray, fill: float = 0) -> Array:
        return sharding.put_rows(rows, chunk, split, fill)

    # Pass 1: similarity of the right pairs, by the kind of product that pass 2 compares with.
    own = np.empty(num_texts, np.float32)
    for start in starts:
        part = slice(start, start + chunk)
        pair = place(text_features[part]), place(image_features[image_of_text[part]])
        own[part] = np.asarray(_pairs(*pair, mesh))[: len(own[part])]
    best = np.full(num_images, -np.inf, np.float32)
    np.maximum.at(best, image_of_text, own)

    # Pass 2: how many wrong ones are at least as similar.
    padded = -(-num_images // _IMAGES) * _IMAGES
    images = sharding.put_rows(image_features, padded, whole)
    bests = sharding.put_rows(best, padded, whole, np.inf)
    text_ranks, image_ranks = np.ones(num_texts, np.int64), np.ones(num_images, np.int64)
    for start in starts:
        part = slice(start, start + chunk)
        real = place(np.ones(len(own[part]), bool))
        by_text, by_image = _count(
            place(text_features[part]), place(own[part], np.inf),
            place(image_of_text[part].astype(np.int32), -1), real, images, bests,
            np.int32(num_images), mesh,
        )  # fmt: skip
        text_ranks[part] += np.asarray(by_text)[: len(own[part])]
        image_ranks += np.asarray(by_image)[:num_images]
    return text_ranks, image_ranks


@functools.partial(jax.jit, static_argnums=2)
def _pairs(
    texts: Float[Array, "T E"], images: Float[Array, "T E"], mesh: Mesh
) -> Float[Array, " T"]:
    # The diagonal of small products: a row-wise sum would round otherwise than a product does.
    size = next(s for s in (64, 32, 16, 8, 4, 2, 1) if len(texts) % s == 0)
    a, b = (x.reshape(-1, size, x.shape[-1]) for x in (texts, images))
    blocks = jax.lax.map(
        lambda pair: jnp.diagonal(jnp.einsum("TE,IE->TI", *pair, precision="highest")), (a, b)
    )
    return jax.lax.with_sharding_constraint(blocks.reshape(-1), sharding.replicated(mesh))


@functools.partial(jax.jit, static_argnums=7)
def _count(
    texts: Float[Array, "T E"],
    own: Float[Array, " T"],
    image_of_text: Int[Array, " T"],
    real: Bool[Array, " T"],
    images: Float[Array, "I E"],
    best: Float[Array, " I"],
    num_images: Int[Array | np.int32, ""],
    mesh: Mesh,
) -> tuple[Int[Array, " T"], Int[Array, " I"]]:
    """Count wrong images at least as similar as each text's own, and wrong texts for each image."""
    size = min(_IMAGES, len(images))

    def block(by_text: Array, start: Array) -> tuple[Array, Array]:
        columns = start + jnp.arange(size)
        some = jax.lax.dynamic_slice_in_dim(images, start, size)
        bar = jax.lax.dynamic_slice_in_dim(best, start, size)
        similarity = jnp.einsum("TE,IE->TI", texts, some, precision="highest")
        wrong = image_of_text[:, None] != columns
        beaten = wrong & (similarity >= own[:, None]) & (columns < num_images)
        beating = wrong & (similarity >= bar) & real[:, None]
        return by_text + beaten.sum(1, dtype=jnp.int32), beating.sum(0, dtype=jnp.int32)

    by_text, by_image = jax.lax.scan(
        block, jnp.zeros_like(image_of_text), jnp.arange(0, len(images), size)
    )
    whole = sharding.replicated(mesh)
    return (
        jax.lax.with_sharding_constraint(by_text, whole),
        jax.lax.with_sharding_constraint(by_image.reshape(-1), whole),
    )


def retrieval(
    image_features: Float[np.ndarray, "images E"],
    text_features: Float[np.ndarray, "texts E"],
    image_of_text: Int[np.ndarray, " owners"],
    mesh: Mesh,
) -> dict[str, float]:
    """Return recall@1, 5 and 10 and the median rank, text → image and image → text.

    `image_retrieval_*` asks with a text for its image, `text_retrieval_*` with an image for any of
    its captions: CLIP_benchmark's names.
    """
    by_text, by_image = ranks(image_features, text_features, image_of_text, mesh)
    values = {}
    for name, own in (("image_retrieval", by_text), ("text_retrieval", by_image)):
        values |= {f"{name}_recall@{k}": float((own <= k).mean()) for k in RECALL_AT}
        values[f"{name}_median_rank"] = float(np.median(own))
    return values
