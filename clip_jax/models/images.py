"""Inputs of an image tower: pixels of one size, or patches of images of any aspect ratio.

Both are trees of NumPy or JAX arrays whose first dimension is the batch, so batches of both are
split, joined, padded and sharded by the same code. A single image is a batch of one.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Float32, Int, Shaped

from clip_jax.errors import InputError

# Mean and standard deviation of RGB in [0, 1].
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
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


Tree = TypeVar("Tree")
Images = Shaped[Any, "_B _H _W _C"] | Patches  # uint8, or normalised


@runtime_checkable
class ImageSpec(Protocol):
    """Shape of a tower's input: `image_spec` of its config and of its preprocessing."""

    @property
    def side(self) -> int:
        """Side in pixels of images drawn for the tower, such as the bundled digits."""

    @property
    def max_patches(self) -> int | None:
        """Most patches of an image at its own aspect ratio (NaFlex); None: images are square."""

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Return the width and height to which an image is resized."""

    def pack(self, pixels: Shaped[np.ndarray, "B H W C"]) -> Images:
        """Turn images of one size, as returned by `fit`, into the tower's input."""

    def shapes(self, batch_size: int) -> Images:
        """Return the arrays of a batch as `jax.ShapeDtypeStruct`s."""

    def check(self, images: Images) -> None:
        """Raise InputError unless images have this shape."""


@dataclasses.dataclass(frozen=True)
class Square:
    """Square images, cropped or resized to `side` pixels."""

    side: int

    @property
    def max_patches(self) -> None:
        """Images are no patches."""
        return None

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Return the square's size, whatever the image's."""
        return self.side, self.side

    def pack(self, pixels: Shaped[np.ndarray, "B H W C"]) -> Images:
        """Return the pixels unchanged."""
        return pixels

    def shapes(self, batch_size: int) -> Images:
        """Return the shape of one array of RGB pixels."""
        return jax.ShapeDtypeStruct((batch_size, self.side, self.side, 3), jnp.uint8)

    def check(self, images: Images) -> None:
        """Raise InputError unless images have this size."""
        if isinstance(images, Patches):
            raise InputError(
                f"images are patches; this model needs pixels [batch, {self.side}, {self.side}, 3] "
                "(vision.max_patches=None). Use the model's own preprocessing."
            )
        if images.shape[1:] != (self.side, self.side, 3):
            raise InputError(
                f"images have shape {images.shape}; this model needs [batch, {self.side}, "
                f"{self.side}, 3] (vision.image_size={self.side}). Resize them."
            )


@dataclasses.dataclass(frozen=True)
class NaFlex:
    """Images at their own aspect ratio, resized to at most `max_patches` patches."""

    max_patches: int
    patch_size: int

    @property
    def side(self) -> int:
        """Side in pixels of the largest square."""
        return math.isqrt(self.max_patches) * self.patch_size

    def fit(self, width: int, height: int) -> tuple[int, int]:
        """Return the largest size that has at most `max_patches` patches (see `fit_patches`)."""
        return fit_patches(width, height, self.patch_size, self.max_patches)

    def pack(self, pixels: Shaped[np.ndarray, "B H W C"]) -> Patches:
        """Cut images of one size into patches, in rows from the top left; pad with zeros."""
        batch, height, width = pixels.shape[:3]
        patch, grid = self.patch_size, (height // self.patch_size, width // self.patch_size)
        length = grid[0] * grid[1]
        if height % patch or width % patch or length > self.max_patches:
            raise InputError(
                f"images of {width} x {height} pixels must have sides that are multiples of the "
                f"patch size {patch}, and at most {self.max_patches} patches. Resize them."
            )
        pixels = rearrange(pixels, "B (h P) (w Q) C -> B (h w) (P Q C)", P=patch, Q=patch)
        padding = ((0, 0), (0, self.max_patches - length), (0, 0))
        grids = np.tile(np.array(grid, np.int32), (batch, 1))
        return Patches(np.pad(pixels, padding), grids, np.full(batch, length, np.int32))

    def shapes(self, batch_size: int) -> Patches:
        """Return the shapes of RGB patches with their grids and lengths."""
        pixels = (batch_size, self.max_patches, 3 * self.patch_size**2)
        return Patches(
            jax.ShapeDtypeStruct(pixels, jnp.uint8),
            jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),
            jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        )

    def check(self, images: Images) -> None:
        """Raise InputError unless images are patches of this size; their number may differ."""
        width = 3 * self.patch_size**2
        if not isinstance(images, Patches) or images.pixels.shape[2:] != (width,):
            raise InputError(
                f"images have shape {pixels_of(images).shape}; this NaFlex model needs patches "
                f"[batch, length, {width}] (vision.patch_size={self.patch_size}). Use the model's "
                "own preprocessing."
            )


@functools.lru_cache(maxsize=1 << 16)
def fit_patches(width: int, height: int, patch: int, most: int) -> tuple[int, int]:
    """Return the width and height of an image scaled to at most `most` patches, also upwards.

    Each side is rounded up to a multiple of `patch`, so the aspect ratio changes slightly. It is
    the rule of the released SigLIP 2 models, step by step: a binary search of the scale.
    """

    def scaled(side: int, scale: float) -> int:
        return max(patch, math.ceil(side * scale / patch) * patch)

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        patches = (scaled(height, middle) / patch) * (scaled(width, middle) / patch)
        low, high = (middle, high) if patches <= most else (low, middle)
    return scaled(width, low), scaled(height, low)


class Tokens(NamedTuple):
    """Token states of images, of which the first `length` of each image are valid."""

    states: Float[Array, "B L D"]
    length: Int[Array, " B"]


ImageTokens = Float[Array, "_B _L _D"] | Tokens


def split_tokens(tokens: ImageTokens) -> tuple[Float[Array, "B L D"], Int[Array, " B"] | None]:
    """Return the states, an array or `Tokens`, and the numbers of valid ones; None: all are."""
    return tokens if isinstance(tokens, Tokens) else (tokens, None)


def join_tokens(states: Float[Array, "B L D"], length: Int[Array, " B"] | None) -> ImageTokens:
    """Undo `split_tokens`."""
    return states if length is None else Tokens(states, length)


def concatenate(batches: Sequence[Tree]) -> Tree:
    """Concatenate batches, trees of arrays such as images, in host memory; a single one is copied,
    too."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *batches)


def stack(views: Sequence[Tree]) -> Tree:
    """Join views of the same images, [B, ...] each, to [B, views, ...], in host memory."""
    return jax.tree.map(lambda *arrays: np.stack(arrays, 1), *views)


def unstack(views: Tree) -> Tree:
    """Return the views of images, [B, views, ...], as a batch [B · views, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), views)


def zeros(spec: ImageSpec, batch_size: int) -> Images:
    """Return a batch of zeros in host memory."""
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), spec.shapes(batch_size))


def write_row(images: Images, row: int, image: Images) -> None:
    """Write one image into a batch in host memory."""
    jax.tree.map(lambda into, x: np.copyto(into[row : row + 1], x), images, image)


def num_bytes(images: Images) -> int:
    """Count the bytes of a batch."""
    return sum(x.nbytes for x in jax.tree.leaves(images))


def valid_patches(images: Images | Float32[np.ndarray, "B E"]) -> dict[str, int]:
    """Count the patches of a batch in host memory, and those that are valid; {} without any, as in
    a batch of embeddings."""
    if not isinstance(images, Patches):
        return {}
    return {
        "patches": math.prod(images.pixels.shape[:2]),
        "valid_patches": int(images.length.sum()),
    }


def is_normalized(images: Images) -> bool:
    """Return whether pixels are normalised values, not bytes."""
    return pixels_of(images).dtype != np.uint8


def pixels_of(images: Images) -> Any:
    """Return the array of pixels: [B, H, W, C], or [B, L, P·P·C] of patches."""
    return images.pixels if isinstance(images, Patches) else images


def pictures(images: Images, patch_size: int) -> list[Shaped[np.ndarray, "_H _W C"]]:
    """Return each image of a batch as an array, without the padding of patches."""
    if not isinstance(images, Patches):
        return list(images)
    return [
        rearrange(x[: h * w], "(h w) (P Q C) -> (h P) (w Q) C", h=h, P=patch_size, Q=patch_size)
        for x, (h, w) in zip(images.pixels, np.asarray(images.grid), strict=True)
    ]


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
