"""What evaluators share: features of any number of images or texts, computed on the whole mesh."""

import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped

from clip_jax import sharding
from clip_jax.models.clip import CLIP, Params, l2_normalize


class Evaluator(Protocol):
    """Built from its own config; yields named numbers."""

    every_steps: int

    def run(self, model: CLIP, params: Params, mesh: Mesh) -> Iterator[tuple[str, float]]: ...


def encode_images(
    model: CLIP, params: Params, images: Shaped[np.ndarray, "B H W C"], mesh: Mesh, *,
    batch_size: int = 256, normalize: bool = True,
) -> Float[np.ndarray, "B E"]:  # fmt: skip
    """Embed images, unit length unless told otherwise, in order, on every process alike."""
    encode = _image_encoder(model, mesh, normalize)
    return _in_batches(encode, params, images, mesh, batch_size)


def encode_texts(
    model: CLIP, params: Params, tokens: Int[np.ndarray, "B L"], mesh: Mesh, *,
    batch_size: int = 256,
) -> Float[np.ndarray, "B E"]:  # fmt: skip
    """Embed token rows, unit length, in the given order, on every process alike."""
    return _in_batches(_text_encoder(model, mesh), params, tokens, mesh, batch_size)


@functools.lru_cache(maxsize=8)
def _image_encoder(model: CLIP, mesh: Mesh, normalize: bool) -> Callable:
    def encode(params: Params, images: jax.Array) -> jax.Array:
        if images.dtype == np.uint8:
            images = model.normalize(images)
        features = model.encode_image(params, images)
        return l2_normalize(features) if normalize else features

    return jax.jit(encode, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=8)
def _text_encoder(model: CLIP, mesh: Mesh) -> Callable:
    def encode(params: Params, tokens: jax.Array) -> jax.Array:
        return l2_normalize(model.encode_text(params, tokens))

    return jax.jit(encode, out_shardings=sharding.replicated(mesh))


def _in_batches(
    encode: Callable, params: Params, rows: np.ndarray, mesh: Mesh, batch_size: int
) -> np.ndarray:
    """Run `encode` over equal batches; the last is filled with copies, cut off again."""
    shards = sharding.batch_shards(mesh)
    batch_size = -(-min(batch_size, len(rows)) // shards) * shards
    placed = sharding.batch_sharding(mesh)
    features = []
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        padding = batch_size - len(batch)
        batch = np.concatenate([batch, np.repeat(batch[-1:], padding, axis=0)])
        batch = jax.make_array_from_callback(batch.shape, placed, batch.__getitem__)
        features.append(np.asarray(encode(params, batch))[: batch_size - padding])
    return np.concatenate(features)
