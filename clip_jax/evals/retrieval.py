"""Image and text retrieval (CLIP paper, table 13): recall@k and median rank.

The rank of a query is 1 plus the number of wrong candidates at least as similar as its best right
one. So ties count against the model: embeddings that are all equal retrieve nothing. The similarity
matrix is computed in blocks of queries, once per direction.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_jax import sharding
from clip_jax.errors import InputError

RECALL_AT = (1, 5, 10)
_ROWS = 512  # queries per block and batch shard


def retrieval(
    image_features: Float[np.ndarray, "images E"],
    text_features: Float[np.ndarray, "texts E"],
    image_of_text: Int[np.ndarray, " owners"],
    mesh: Mesh,
) -> dict[str, float]:
    """Return recall@1, 5 and 10 and the median rank, text → image and image → text.

    In CLIP_benchmark's names, `image_retrieval_*` finds the image of a text, and `text_retrieval_*`
    any caption of an image.
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
    num_images = len(image_features)
    captioned = np.bincount(image_of_text, minlength=num_images)
    if not captioned.all():
        raise InputError(f"image {np.argmin(captioned)} has no caption; remove images without one.")
    captions = np.full((num_images, captioned.max()), -1, np.int32)
    order = np.argsort(image_of_text, kind="stable")
    captions[image_of_text[order], np.concatenate([np.arange(n) for n in captioned])] = order
    image = image_of_text.astype(np.int32)[:, None]
    return (
        _ranks(text_features, image_features, image, mesh),
        _ranks(image_features, text_features, captions, mesh),
    )


def _ranks(
    queries: Float[np.ndarray, "Q E"],
    candidates: Float[np.ndarray, "C E"],
    right: Int[np.ndarray, "Q K"],
    mesh: Mesh,
) -> Int[np.ndarray, " Q"]:
    """`right` holds the indices of each query's right candidates, padded with −1."""
    rank = jax.jit(_rank, out_shardings=sharding.replicated(mesh))
    known = jax.device_put(candidates, sharding.replicated(mesh))
    rows = _ROWS * sharding.batch_shards(mesh)
    return sharding.in_batches(rank, mesh, known, queries, right, batch_size=rows)


def _rank(
    candidates: Float[Array, "C E"], queries: Float[Array, "Q E"], right: Int[Array, "Q K"]
) -> Int[Array, " Q"]:
    similarity = jnp.einsum("QE,CE->QC", queries, candidates, precision="highest")
    own = jnp.take_along_axis(similarity, jnp.maximum(right, 0), axis=1)
    own = jnp.where(right >= 0, own, -jnp.inf)
    best = own.max(axis=1, keepdims=True)
    return 1 + (similarity >= best).sum(axis=1, dtype=jnp.int32) - (own >= best).sum(axis=1)
