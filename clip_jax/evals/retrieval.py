"""Retrieval both ways (CLIP paper, table 13): recall@k and median rank.

The rank of a query is 1 plus the number of wrong candidates that are at least as similar as its
best right one, so ties count against the model: features that are all the same retrieve nothing.
The similarity matrix is computed in blocks of queries, once for each direction.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_jax import sharding
from clip_jax.errors import InputError

RECALL_AT = (1, 5, 10)
_BLOCK = 1 << 26  # similarities of a block on each batch shard


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


def ranks(
    image_features: Float[np.ndarray, "images E"],
    text_features: Float[np.ndarray, "texts E"],
    image_of_text: Int[np.ndarray, " owners"],
    mesh: Mesh,
) -> tuple[Int[np.ndarray, " texts"], Int[np.ndarray, " images"]]:
    """Rank the right image of every text, and the best caption of every image; 1 is the best.

    Features are unit vectors. Raises InputError for an image without a caption.
    """
    num_images, num_texts = len(image_features), len(text_features)
    if len(image_of_text) != num_texts:
        raise ValueError(f"{num_texts} texts need as many image indices, not {len(image_of_text)}.")
    if num_texts and not 0 <= image_of_text.min() <= image_of_text.max() < num_images:
        raise ValueError(f"image_of_text must lie in 0 to {num_images - 1}, the images given.")
    captioned = np.bincount(image_of_text, minlength=num_images)
    if not captioned.all():
        raise InputError(f"image {np.argmin(captioned)} has no caption; leave such images out.")
    images = image_features, np.arange(num_images, dtype=np.int32)
    texts = text_features, image_of_text.astype(np.int32)
    return _ranks(texts, images, mesh), _ranks(images, texts, mesh)


Side = tuple[Float[np.ndarray, "B E"], Int[np.ndarray, " B"]]  # features, and whose image they are


def _ranks(queries: Side, candidates: Side, mesh: Mesh) -> Int[np.ndarray, " B"]:
    known = jax.device_put(candidates, sharding.replicated(mesh))
    rows = max(_BLOCK // len(candidates[0]), 1) * sharding.batch_shards(mesh)
    rank = lambda known, *rows: _rank(*rows, *known, mesh)  # noqa: E731
    return sharding.in_batches(rank, mesh, known, *queries, batch_size=rows)


@functools.partial(jax.jit, static_argnums=4)
def _rank(
    queries: Float[Array, "Q E"], query_ids: Int[Array, " Q"],
    candidates: Float[Array, "C E"], candidate_ids: Int[Array, " C"], mesh: Mesh,
) -> Int[Array, " Q"]:  # fmt: skip
    similarity = jnp.einsum("QE,CE->QC", queries, candidates, precision="highest")
    right = query_ids[:, None] == candidate_ids
    best = jnp.where(right, similarity, -jnp.inf).max(axis=1, keepdims=True)
    rank = 1 + (~right & (similarity >= best)).sum(axis=1, dtype=jnp.int32)
    return jax.lax.with_sharding_constraint(rank, sharding.replicated(mesh))
