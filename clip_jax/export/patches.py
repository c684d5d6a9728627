"""Inputs of exported NaFlex models: patches as the named arrays of transformers' Siglip2 models."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from clip_jax.models.images import Images, NaFlex, Patches

PIXELS, MASK, GRID = "pixel_values", "pixel_attention_mask", "spatial_shapes"
DESCRIPTION = """`pixel_values` [batch, patches, values], normalised,
`pixel_attention_mask` [batch, patches], 1 for valid patches, which come first, and
`spatial_shapes` [batch, 2], rows and columns of patches"""


def shapes(spec: NaFlex, batch: Any, patches: Any) -> dict[str, tuple[Any, ...]]:
    """Return the shape of each array, for sizes that may be symbols."""
    values = 3 * spec.patch_size**2
    return {PIXELS: (batch, patches, values), MASK: (batch, patches), GRID: (batch, 2)}


def to_arrays(images: Patches) -> dict[str, np.ndarray]:
    """Return normalised pixels [B, L, P·P·3], the mask of valid patches [B, L], and grids [B, 2].

    Integers are int64; a grid is the number of rows and of columns of patches.
    """
    pixels, length = np.asarray(images.pixels), np.asarray(images.length)
    mask = (np.arange(pixels.shape[1]) < length[:, None]).astype(np.int64)
    return {PIXELS: pixels, MASK: mask, GRID: np.asarray(images.grid, np.int64)}


def from_arrays(inputs: Any) -> Images:
    """Undo `to_arrays`, where the valid patches of an image are its first; keep square images."""
    if not isinstance(inputs, dict):
        return inputs
    return Patches(inputs[PIXELS], inputs[GRID], jnp.sum(inputs[MASK], axis=1, dtype=jnp.int32))
