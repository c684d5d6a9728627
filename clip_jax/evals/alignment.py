"""How the two modalities lie on their sphere, and the training loss on pairs held out.

Alignment and uniformity: Wang & Isola, 2020 (arXiv:2005.10242), α = 2 and t = 2. Modality gap:
Liang et al., 2022 (arXiv:2203.02053), the distance between the modalities' centroids.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from clip_jax import sharding
from clip_jax.errors import InputError

POOL = 1_024  # pairs that compete; the loss grows with their logarithm, so runs must share it
_CHUNK = 1_024  # rows of a block on each batch shard


def alignment(
    image_features: Float[np.ndarray, "B E"], text_features: Float[np.ndarray, "B E"]
) -> float:
    """Return the mean squared distance of pairs of unit vectors; 0 is perfect."""
    return float(np.square(image_features - text_features).sum(axis=1).mean())


def uniformity(features: Float[np.ndarray, "B E"], mesh: Mesh) -> float:
    """Return log mean exp(−2 ‖x − y‖²) over all pairs of unit vectors: 0 if all are the same, less
    the more evenly they cover the sphere."""
    if len(features) < 2:
        raise InputError(f"uniformity needs at least 2 features, got {len(features)}.")
    count = len(features)
    chunk = min(_CHUNK, -(-count // sharding.batch_shards(mesh))) * sharding.batch_shards(mesh)
    whole = sharding.put_rows(features, len(features), sharding.replicated(mesh))
    total = 0.0
    for start in range(0, count, chunk):
        rows = features[start : start + chunk]
        index = np.arange(start, start + chunk, dtype=np.int32)
        index[len(rows) :] = -1
        split = sharding.batch_sharding(mesh)
        total += float(
            _potential(
                sharding.put_rows(rows, chunk, split),
                sharding.put_rows(index, chunk, split),
                whole,
                mesh,
            )
        )
    return float(np.log(total / (count * (count - 1))))


def modality_gap(
    image_features: Float[np.ndarray, "B E"], text_features: Float[np.ndarray, "B E"]
) -> float:
    """Return the distance between the mean image and the mean text."""
    return float(np.linalg.norm(image_features.mean(axis=0) - text_features.mean(axis=0)))


def info_nce(
    image_features: Float[np.ndarray, "B E"],
    text_features: Float[np.ndarray, "B E"],
    logit_scale: float,
    mesh: Mesh,
    *,
    pool: int = POOL,
) -> float:
    """Return the symmetric contrastive loss among `pool` pairs, averaged over pools of that size.

    Unit vectors; `logit_scale` is the factor itself, not its logarithm. Pools are consecutive
    pairs; what does not fill a last one is left out, since fewer negatives are an easier task.
    """
    if not 2 <= pool <= len(image_features):
        raise InputError(
            f"info_nce with pool={pool} needs 2 <= pool <= the {len(image_features)} pairs given."
        )
    shards = sharding.batch_shards(mesh)
    padded = -(-pool // shards) * shards
    real = sharding.put_rows(np.ones(pool, bool), padded, sharding.replicated(mesh))
    losses = []
    for start in range(0, len(image_features) - pool + 1, pool):
        images, texts = (
            sharding.put_rows(x[start : start + pool], padded, sharding.batch_sharding(mesh))
            for x in (image_features, text_features)
        )
        losses.append(float(_loss(images, texts, np.float32(logit_scale), real, mesh)))
    return float(np.mean(losses))


def diagnostics(
    image_features: Float[np.ndarray, "B E"],
    text_features: Float[np.ndarray, "B E"],
    logit_scale: float,
    mesh: Mesh,
    *,
    pool: int = POOL,
) -> dict[str, float]:
    """Return all of the above for held-out pairs of unit vectors, by name."""
    return {
        "alignment": alignment(image_features, text_features),
        "uniformity/image": uniformity(image_features, mesh),
        "uniformity/text": uniformity(text_features, mesh),
        "modality_gap": modality_gap(image_features, text_features),
        "info_nce": info_nce(image_features, text_features, logit_scale, mesh, pool=pool),
    }


@functools.partial(jax.jit, static_argnums=3)
def _potential(
    rows: Float[Array, "R E"], index: Int[Array, " R"], features: Float[Array, "B E"], mesh: Mesh
) -> Float[Array, ""]:
    cosine = jnp.einsum("RE,BE->RB", rows, features, precision="highest")
    other = (index[:, None] != jnp.arange(len(features))) & (index >= 0)[:, None]
    total = jnp.where(other, jnp.exp(-4 * (1 - cosine)), 0).sum()  # ‖x − y‖² = 2 − 2 cos
    return jax.lax.with_sharding_constraint(total, sharding.replicated(mesh))


@functools.partial(jax.jit, static_argnums=4)
def _loss(
    images: Float[Array, "B E"], texts: Float[Array, "B E"],
    logit_scale: Float[Array | np.float32, ""], real: Bool[Array, " B"], mesh: Mesh,
) -> Float[Array, ""]:  # fmt: skip
    logits = logit_scale * jnp.einsum("BE,CE->BC", images, texts, precision="highest")
    logits = jnp.where(real[:, None] & real, logits, -jnp.inf)
    own = jnp.where(real, jnp.diagonal(logits), 0)
    by_text, by_image = (jax.nn.logsumexp(logits, axis=axis) for axis in (0, 1))
    losses = jnp.where(real, (by_text + by_image) / 2 - own, 0)
    total = losses.sum() / real.sum()
    return jax.lax.with_sharding_constraint(total, sharding.replicated(mesh))
