"""Captions on the whole mesh: written, and how probable given ones are."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from clip_jax import sharding
from clip_jax.evals.evaluator import Encoder, laid_out
from clip_jax.losses import Axes, CaptionConfig, caption_loss
from clip_jax.models.clip import CLIP, Params
from clip_jax.models.generation import GenerationConfig, generate
from clip_jax.models.images import Images

AXES = Axes(sharding.BATCH_AXES, sharding.DIMENSIONS["D"], sharding.DIMENSIONS["V"])


@functools.lru_cache(maxsize=8)
def writer(
    model: CLIP, mesh: Mesh, generation: GenerationConfig
) -> Callable[[Params, Any], jax.Array]:
    """Compile what writes captions of a batch over the mesh; the ids are on every device."""
    model = laid_out(model, mesh)

    def write(params: Params, images: Images) -> jax.Array:
        _, image_tokens = model.encode_image_and_tokens(params, model.normalize(images))
        return generate(model, params, image_tokens, generation)

    return jax.jit(write, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=8)
def scorer(model: CLIP, mesh: Mesh) -> Callable[..., jax.Array]:
    """Compile the loss of each image's own text, [B], summed over its tokens."""
    model = laid_out(model, mesh)

    def score(params: Params, images: Images, tokens: jax.Array) -> jax.Array:
        _, image_tokens = model.encode_image_and_tokens(params, model.normalize(images))
        return _loss(model, mesh, params, image_tokens, tokens)

    return jax.jit(score, out_shardings=sharding.replicated(mesh))


@functools.lru_cache(maxsize=8)
def likelihood(model: CLIP, mesh: Mesh) -> Callable[..., Callable[[Params, Any], jax.Array]]:
    """Compile log p(text | image) of all images and all of some texts, [B, texts].

    Called with the texts' tokens it returns the function of parameters and images.
    """
    model = laid_out(model, mesh)

    def score(params: Params, images: Images, tokens: jax.Array) -> jax.Array:
        _, image_tokens = model.encode_image_and_tokens(params, model.normalize(images))
        by_rows = model.layout.constrain

        def one(text: jax.Array) -> jax.Array:
            rows = by_rows(jax.numpy.broadcast_to(text, (len(image_tokens), len(text))))
            return -_loss(model, mesh, params, image_tokens, rows)

        return jax.lax.map(one, tokens).T

    compiled = jax.jit(score, out_shardings=sharding.replicated(mesh))
    return lambda tokens: lambda params, images: compiled(params, images, tokens)


def _loss(
    model: CLIP, mesh: Mesh, params: Params, image_tokens: jax.Array, tokens: jax.Array
) -> jax.Array:
    _, states = model.encode_text_and_write(params, tokens, image_tokens)
    return caption_loss(
        model.layout.constrain(states), params["decoder"]["vocab_projection"], tokens[:, 1:],
        pad_id=model.config.text.tokenizer.pad_id, chunk_size=CaptionConfig().chunk_size,
        mesh=mesh, axes=AXES,
    )  # fmt: skip


def captions(encoder: Encoder, images: Images, generation: GenerationConfig) -> list[str]:
    """Describe images that every process has."""
    write = writer(encoder.model, encoder.mesh, generation)
    return encoder.read(sharding.in_batches(write, encoder.mesh, encoder.params, images))


def loss_per_token(encoder: Encoder, images: Images, tokens: Int[np.ndarray, "B L"]) -> float:
    """Return the caption loss of pairs that every process has: the mean of all tokens."""
    score = scorer(encoder.model, encoder.mesh)
    rows: Float[np.ndarray, " B"] = sharding.in_batches(
        score, encoder.mesh, encoder.params, images, tokens
    )
    real = tokens[:, 1:] != encoder.model.config.text.tokenizer.pad_id
    return float(rows.sum() / max(real.sum(), 1))
