"""Inputs of an image tower: pixels of one size, or packed patches of images of any shape.

Both are trees of NumPy or JAX arrays whose first dimension is the batch, so batches of both are
split, joined, padded and sharded by the same code. A single image is a batch of one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Shaped, UInt8

from clip_jax.errors import InputError

# Mean and standard deviation of RGB in [0, 1].
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
INCEPTION_MEAN = INCEPTION_STD = (0.5, 0.5, 0.5)  # SigLIP's, by timm's name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Patches:
    """Images as sequences of patches, padded to length L (NaFlex; SigLIP 2 paper, 2.4.2).

    A row of zeros, which pads a batch, has no valid patch; its features are finite.
    """

    pixels: Any  # uint8 [B, L, P·P·C], within a patch in the order row, column, channel
    grid: Any  # int32 [B, 2], rows and columns of patches
    length: Any  # int32 [B], number of valid patches; padding follows


Images = Shaped[Any, "_B _H _W _C"] | Patches  # uint8, or normalised


@runtime_checkable
class ImageSpec(Protocol):
    """Shape of a tower's input: `image_spec` of its config and of its preprocessing."""

    @property
    def side(self) -> int:
        """Side in pixels of images drawn for the tower, such as the bundled digits."""

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height to which an image is resized."""

    def pack(self, pixels: UInt8[np.ndarray, "B H W C"]) -> Images:
        """Turn images of one size, as returned by `fit`, into the tower's input."""

    def shapes(self, batch_size: int) -> Images:
        """Return the arrays of a batch as `jax.ShapeDtypeStruct`s."""


@dataclasses.dataclass(frozen=True)
class Square:
    """Square images, cropped or resized to `side` pixels."""

    side: int

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Return the square's size, whatever the image's."""
        return self.side, self.side

    def pack(self, pixels: UInt8[np.ndarray, "B H W C"]) -> Images:
        """Return the pixels unchanged."""
        return pixels

    def shapes(self, batch_size: int) -> Images:
        """Return the shape of one array of RGB pixels."""
        return jax.ShapeDtypeStruct((batch_size, self.side, self.side, 3), jnp.uint8)

    def check(self, images: Shaped[Any, "B H W C"]) -> None:
        """Raise InputError unless images have this size."""
        if images.shape[1:] != (self.side, self.side, 3):
            raise InputError(
                f"images have shape {images.shape}; this model needs [batch, {self.side}, "
                f"{self.side}, 3] (vision.image_size={self.side}). Resize them."
            )


def concatenate(batches: Sequence[Images]) -> Images:
    """Concatenate batches in host memory; also a single batch is copied."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


def zeros(spec: ImageSpec, batch_size: int) -> Images:
    """Return a batch of zeros in host memory."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec.shapes(batch_size))


def write_row(images: Images, row: int, image: Images) -> None:
    """Write one image into a batch in host memory."""
    jax.tree.map(lambda into, x: np.copyto(into[row : row + 1], x), images, image)


def num_bytes(images: Images) -> int:
    """Count the bytes of a batch."""
    return sum(x.nbytes for x in jax.tree.leaves(images))


def is_normalized(images: Images) -> bool:
    """Return whether pixels are normalised values, not bytes."""
    return pixels_of(images).dtype != np.uint8


def pixels_of(images: Images) -> Any:
    """Return the array of pixels: [B, H, W, C], or [B, L, P·P·C] of patches."""
    return images.pixels if isinstance(images, Patches) else images


def with_pixels(images: Images, pixels: Any) -> Images:
    """Return the images with their pixels replaced."""
    return dataclasses.replace(images, pixels=pixels) if isinstance(images, Patches) else pixels


def as_dtype(images: Images, dtype: Any) -> Any:
    """Return the images with pixels of a dtype, such as the tower's."""
    return with_pixels(images, jnp.asarray(pixels_of(images), dtype))


def normalize(images: Images, mean: Sequence[float], std: Sequence[float]) -> Images:
    """Scale bytes to [0, 1], then by each channel's mean and standard deviation, in float32."""
    pixels = pixels_of(images)
    times = pixels.shape[-1] // len(mean)  # a patch has all its pixels in the last dimension
    shift, scale = (np.tile(np.asarray(x, np.float32), times) for x in (mean, std))
    return with_pixels(images, (pixels.astype(np.float32) / np.float32(255) - shift) / scale)
