"""Image and text retrieval (CLIP paper, table 13): recall@k and median rank.

A query is right if its best right candidate is among the first k. Of equal similarities every order
is equally likely (see `ranks`), so embeddings that are all equal retrieve at chance level. The
similarity matrix is computed in blocks of queries, once per direction.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_jax import sharding
from clip_jax.errors import InputError
from clip_jax.evals.ranks import Standing

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
    for name, standing in (("image_retrieval", by_text), ("text_retrieval", by_image)):
        values |= {f"{name}_recall@{k}": float(standing.within(k).mean()) for k in RECALL_AT}
        values[f"{name}_median_rank"] = float(np.median(standing.rank()))
    return values


def ranks(
    image_features: Float[np.ndarray, "images E"],
    text_features: Float[np.ndarray, "texts E"],
    image_of_text: Int[np.ndarray, " owners"],
    mesh: Mesh,
) -> tuple[Standing, Standing]:
    """Compare the right image of every text, and the best caption of every image, with the others.

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
        _standing(text_features, image_features, image, mesh),
        _standing(image_features, text_features, captions, mesh),
    )


def _standing(
    queries: Float[np.ndarray, "Q E"],
    candidates: Float[np.ndarray, "C E"],
    right: Int[np.ndarray, "Q K"],
    mesh: Mesh,
) -> Standing:
    """`right` holds the indices of each query's right candidates, padded with −1."""
    count = jax.jit(_count, out_shardings=sharding.replicated(mesh))
    candidates = jax.device_put(candidates, sharding.replicated(mesh))
    rows = _ROWS * sharding.batch_shards(mesh)
    counts = sharding.in_batches(count, mesh, candidates, queries, right, batch_size=rows)
    above, tied, of_right = counts.T
    return Standing(np.where(above < 0, np.inf, above), tied, of_right)


def _count(
    candidates: Float[Array, "C E"], queries: Float[Array, "Q E"], right: Int[Array, "Q K"]
) -> Int[Array, "Q 3"]:
    """Count the fields of `Standing`; −1 candidates are above where a similarity is not finite."""
    similarity = jnp.einsum("QE,CE->QC", queries, candidates, precision="highest")
    to_right = jnp.take_along_axis(similarity, jnp.maximum(right, 0), axis=1)
    to_right = jnp.where(right >= 0, to_right, -jnp.inf)
    best = to_right.max(axis=1, keepdims=True)
    above, equal = (similarity > best).sum(axis=1), (similarity == best).sum(axis=1)
    of_right = (to_right == best).sum(axis=1)
    counts = jnp.stack([above, equal - of_right, of_right], axis=1)
    is_finite = jnp.isfinite(similarity).all(axis=1, keepdims=True)
    return jnp.where(is_finite, counts, jnp.array([-1, 0, 1])).astype(jnp.int32)
