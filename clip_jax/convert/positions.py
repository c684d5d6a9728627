"""Position embeddings of the image tower for another image size, as open_clip resizes them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from clip_jax.convert.state_dict import flatten, unflatten
from clip_jax.convert.weights import Weights
from clip_jax.models.resnet import ResNetConfig


def resize_positions(weights: Weights, image_size: int) -> Weights:
    """Return the model for images of `image_size` pixels; positions by antialiased bicubic.

    The class token's (a ResNet's mean token's) position stays. Raises ValueError for a size that
    the architecture cannot have.
    """
    vision = replace(weights.config.vision, image_size=image_size)
    config = replace(weights.config, vision=vision)
    preprocess = replace(weights.preprocess, image_size=image_size)
    flat = flatten(weights.params)
    resnet = isinstance(vision, ResNetConfig)
    name = "visual/attnpool/positional_embedding" if resnet else "visual/positional_embedding"
    before = np.asarray(flat[name])
    extra = 1 if resnet else int(vision.class_token)
    side = round((vision.num_tokens - extra) ** 0.5)
    old_side = round((len(before) - extra) ** 0.5)
    if side != old_side:
        grid = rearrange(before[extra:].astype(np.float32), "(h w) D -> h w D", h=old_side)
        grid = jax.image.resize(jnp.asarray(grid), (side, side, grid.shape[-1]), "cubic")
        grid = rearrange(np.asarray(grid), "h w D -> (h w) D").astype(before.dtype)
        flat[name] = np.concatenate([before[:extra], grid])
    return replace(weights, config=config, preprocess=preprocess, params=unflatten(flat))
