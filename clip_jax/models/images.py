"""What an image tower takes: pixels of one size, or packed patches of images of any shape.

Both are trees of arrays, NumPy's or JAX's, whose first dimension counts images. So batches are cut,
joined, filled up and sharded alike, whatever they hold; and one image is a batch of one.
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
    """Images as rows of patches, each filled up to L of them (NaFlex; SigLIP 2 paper, 2.4.2).

    A row of zeros, which fills up a batch, has no valid patch; a tower gives it finite features.
    """

    pixels: Any  # uint8 [B, L, P·P·C], of a patch in the order row, column, channel
    grid: Any  # int32 [B, 2], rows and columns of patches
    length: Any  # int32 [B], how many patches are valid, from the first


Images = Shaped[Any, "_B _H _W _C"] | Patches  # uint8, or normalised


@runtime_checkable
class ImageSpec(Protocol):
    """What a tower takes of an image. Its config has one as `image_spec`, its preprocessing too."""

    @property
    def side(self) -> int:
        """Pixels a side of images that are drawn for the tower, such as the bundled digits."""

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height to which an image is resized."""

    def pack(self, pixels: UInt8[np.ndarray, "B H W C"]) -> Images:
        """Turn images of one size that fits into what the tower takes."""

    def shapes(self, batch_size: int) -> Images:
        """Return a batch's arrays as `jax.ShapeDtypeStruct`s."""


@dataclasses.dataclass(frozen=True)
class Square:
    """Pixels of a square, which is cut from an image or to which it is squeezed."""

    side: int

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Every image gets the same size."""
        return self.side, self.side

    def pack(self, pixels: UInt8[np.ndarray, "B H W C"]) -> Images:
        """Pixels are what the tower takes."""
        return pixels

    def shapes(self, batch_size: int) -> Images:
        """One array of RGB pixels."""
        return jax.ShapeDtypeStruct((batch_size, self.side, self.side, 3), jnp.uint8)

    def check(self, images: Shaped[Any, "B H W C"]) -> None:
        """Raise InputError unless images have this size."""
        if images.shape[1:] != (self.side, self.side, 3):
            raise InputError(
                f"images have shape {images.shape}; this model needs "
                f"[batch, {self.side}, {self.side}, 3] (vision.image_size={self.side})."
            )


def concatenate(batches: Sequence[Images]) -> Images:
    """Join batches in host memory: a copy, also of a single one."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


def zeros(spec: ImageSpec, batch_size: int) -> Images:
    """Make a batch in host memory that holds no image yet."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec.shapes(batch_size))


def write_row(images: Images, row: int, image: Images) -> None:
    """Put one image into a batch in host memory."""
    jax.tree.map(lambda into, x: np.copyto(into[row : row + 1], x), images, image)


def num_bytes(images: Images) -> int:
    """Count the bytes of a batch."""
    return sum(x.nbytes for x in jax.tree.leaves(images))


def is_normalized(images: Images) -> bool:
    """Tell normalised values from bytes."""
    return pixels_of(images).dtype != np.uint8


def pixels_of(images: Images) -> Any:
    """Return the array of pixels: [B, H, W, C], or [B, L, P·P·C] of patches."""
    return images.pixels if isinstance(images, Patches) else images


def with_pixels(images: Images, pixels: Any) -> Images:
    """Return the images with other values of the pixels."""
    return dataclasses.replace(images, pixels=pixels) if isinstance(images, Patches) else pixels


def as_dtype(images: Images, dtype: Any) -> Any:
    """Return the images with pixels of the dtype in which a tower computes."""
    return with_pixels(images, jnp.asarray(pixels_of(images), dtype))


def normalize(images: Images, mean: Sequence[float], std: Sequence[float]) -> Images:
    """Scale bytes to [0, 1], then by each channel's mean and standard deviation, in float32."""
    pixels = pixels_of(images)
    times = pixels.shape[-1] // len(mean)  # of a patch all pixels are in the last dimension
    shift, scale = (np.tile(np.asarray(x, np.float32), times) for x in (mean, std))
    return with_pixels(images, (pixels.astype(np.float32) / np.float32(255) - shift) / scale)
