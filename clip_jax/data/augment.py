"""Augmentations of images: optional ones in training (SimCLR, appendix A), and stored ones.

In training all are off by default, as in CLIP. The operations are RandAugment's (1909.13719), with
torchvision's ids, magnitudes and pixels. Stored augmentations are replayed as in MobileCLIP.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from clip_jax.data.images import ImageLike, decode, random_box
from clip_jax.data.sources import SampleError
from clip_jax.errors import check_ranges
from clip_jax.models.images import ImageSpec

Operations = tuple[tuple[int, float] | None, ...]  # index in `_OPERATIONS` and magnitude


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Augmentations besides cropping: their probabilities and the strength of the colour jitter."""

    flip: float = 0.0  # Probability of mirroring; avoid it if captions say left or right.
    color_jitter: float = 0.0  # Probability of jittering the colours; SimCLR uses 0.8.
    brightness: float = 0.4  # Jitter of the brightness: a factor between 1 - x and 1 + x.
    contrast: float = 0.4  # Jitter of the contrast: a factor between 1 - x and 1 + x.
    saturation: float = 0.4  # Jitter of the saturation: a factor between 1 - x and 1 + x.
    hue: float = 0.1  # Jitter of the hue: largest turn of the colour circle, at most 0.5 turns.
    grayscale: float = 0.0  # Probability of converting to grayscale; SimCLR uses 0.2.
    operations: int = 0  # Number of RandAugment's operations for each image; MobileCLIP uses 2.

    def __post_init__(self) -> None:
        names = ("flip", "color_jitter", "grayscale", "brightness", "contrast", "saturation")
        check_ranges(self, "data.augment.", **dict.fromkeys(names, "[0, 1]"), hue="[0, 0.5]")
        check_ranges(self, "data.augment.", operations="[0, inf)")


@dataclass(frozen=True, kw_only=True)
class AugmentationsConfig:
    """How stored augmentations are drawn; the defaults are MobileCLIP's."""

    smallest_crop: float = 0.08  # Smallest share of an image's area that a crop has.
    flip: float = 0.0  # Probability of mirroring; avoid it if captions say left or right.
    operations: int = 2  # Number of RandAugment's operations for each augmentation.
    size: int = 224  # Side of images to which magnitudes in pixels refer: that of the student's.

    def __post_init__(self) -> None:
        ranges = {"smallest_crop": "(0, 1]", "flip": "[0, 1]", "operations": "[0, inf)"}
        check_ranges(self, "augmentations.", size="[1, inf)", **ranges)


@dataclass(frozen=True)
class Augmentation:
    """One augmentation of one image, as it is stored."""

    box: tuple[int, int, int, int] | None = None  # top, left, height, width; None: the full image
    flip: bool | None = None  # None: none of the set's images is flipped
    operations: Operations | None = ()


def augment(
    pixels: UInt8[np.ndarray, "H W 3"],
    rng: np.random.Generator,
    config: AugmentConfig,
    size: int | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Apply the enabled augmentations; a disabled one draws nothing from `rng`.

    Magnitudes in pixels are drawn for images of `size` pixels, and scaled to this one.
    """
    if config.flip and rng.random() < config.flip:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    if config.operations:
        size = size or pixels.shape[1]
        operations = _draw_operations(rng, config.operations, size)
        pixels = np.array(_apply(Image.fromarray(pixels), operations, size))
    if config.color_jitter and rng.random() < config.color_jitter:
        pixels = np.array(_jitter(Image.fromarray(pixels), rng, config))
    if config.grayscale and rng.random() < config.grayscale:
        pixels = np.array(Image.fromarray(pixels).convert("L").convert("RGB"))
    return pixels


def _jitter(image: Image.Image, rng: np.random.Generator, config: AugmentConfig) -> Image.Image:
    """Change brightness, contrast, saturation and hue, in random order."""
    enhancers = (
        (ImageEnhance.Brightness, config.brightness),
        (ImageEnhance.Contrast, config.contrast),
        (ImageEnhance.Color, config.saturation),
    )
    for which in rng.permutation(4):
        if which < 3:
            enhancer, strength = enhancers[which]
            image = enhancer(image).enhance(1 + float(rng.uniform(-strength, strength)))
        else:
            hue, saturation, value = image.convert("HSV").split()
            turn = round(256 * float(rng.uniform(-config.hue, config.hue)))
            hue = hue.point([(level + turn) % 256 for level in range(256)])
            image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    return image


# ------------------------------------------------------------------------- stored augmentations


def draw(
    width: int, height: int, rng: np.random.Generator, config: AugmentationsConfig
) -> Augmentation:
    """Draw an augmentation for an image of this size."""
    left, top, right, bottom = random_box(width, height, rng, (config.smallest_crop, 1.0))
    flip = bool(rng.random() < config.flip) if config.flip else None
    operations = _draw_operations(rng, config.operations, config.size)
    return Augmentation((top, left, bottom - top, right - left), flip, operations)


def center(width: int, height: int) -> Augmentation:
    """Return the central square of an image of this size, which changes nothing else."""
    side = min(width, height)
    return Augmentation(((height - side) // 2, (width - side) // 2, side, side))


def replay(
    image: ImageLike,
    augmentation: Augmentation,
    specs: Sequence[ImageSpec],
    size: int | None = None,
) -> list[UInt8[np.ndarray, "_H _W 3"]]:
    """Decode an image and apply an augmentation for each input, whose crops are the same.

    Magnitudes in pixels refer to images of `size` pixels; without it, to the first input's. Raises
    ImageError, and SampleError if the image has no such box.
    """
    decoded = decode(image)
    top, left, height, width = augmentation.box or (0, 0, decoded.height, decoded.width)
    bottom = top + height
    right = left + width
    if not (0 <= top < bottom <= decoded.height and 0 <= left < right <= decoded.width):
        raise SampleError(
            f"augmentation: the box of {width} x {height} pixels at column {left}, row {top} is "
            f"not inside the image of {decoded.width} x {decoded.height}, so it is of another"
        )
    crop = decoded.crop((left, top, right, bottom))
    operations = augmentation.operations or ()
    views = []
    for spec in specs:
        view = crop.resize(spec.fit(width, height), Image.Resampling.BICUBIC)
        if augmentation.flip:
            view = ImageOps.mirror(view)
        views.append(np.array(_apply(view, operations, size or specs[0].side)))
    return views


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)  # nearest, black outside


# Operation, magnitudes of the first and the last level, and whether a sign is drawn. The magnitude
# of a translation is a share of the side; that of Posterize is the number of bits.
_OPERATIONS: tuple[tuple[Callable[[Image.Image, float], Image.Image], float, float, bool], ...] = (
    (lambda image, _: image, 0, 0, False),
    (lambda image, x: _affine(image, 1, x, 0, 0, 1, 0), 0, 0.3, True),
    (lambda image, x: _affine(image, 1, 0, 0, x, 1, 0), 0, 0.3, True),
    (lambda image, x: _affine(image, 1, 0, -int(x), 0, 1, 0), 0, 150 / 331, True),
    (lambda image, x: _affine(image, 1, 0, 0, 0, 1, -int(x)), 0, 150 / 331, True),
    (lambda image, x: image.rotate(x), 0, 30, True),
    (lambda image, x: ImageEnhance.Brightness(image).enhance(1 + x), 0, 0.9, True),
    (lambda image, x: ImageEnhance.Color(image).enhance(1 + x), 0, 0.9, True),
    (lambda image, x: ImageEnhance.Contrast(image).enhance(1 + x), 0, 0.9, True),
    (lambda image, x: ImageEnhance.Sharpness(image).enhance(1 + x), 0, 0.9, True),
    (lambda image, x: ImageOps.posterize(image, int(x)), 8, 4, False),
    (lambda image, x: ImageOps.solarize(image, math.ceil(x)), 255, 0, False),
    (lambda image, _: ImageOps.autocontrast(image), 0, 0, False),
    (lambda image, _: ImageOps.equalize(image), 0, 0, False),
)
OPERATIONS = len(_OPERATIONS)
POSTERIZE = 10
_TRANSLATE_X = 3
_TRANSLATE_Y = 4
_LEVELS = 31


def _draw_operations(rng: np.random.Generator, count: int, size: int) -> Operations:
    """Draw operations, levels and signs uniformly, for images of `size` pixels."""
    operations = []
    for which, level, sign in rng.integers((OPERATIONS, _LEVELS, 2), size=(count, 3)).tolist():
        _, first, last, signed = _OPERATIONS[which]
        magnitude = float(first + (last - first) * level / (_LEVELS - 1))
        if which in (_TRANSLATE_X, _TRANSLATE_Y):
            magnitude *= size
        elif which == POSTERIZE:
            magnitude = float(round(magnitude))
        operations.append((which, -magnitude if signed and sign else magnitude))
    return tuple(operations)


def _apply(image: Image.Image, operations: Operations, size: int) -> Image.Image:
    for which, magnitude in filter(None, operations):
        if which in (_TRANSLATE_X, _TRANSLATE_Y):
            magnitude *= image.size[which - _TRANSLATE_X] / size
        image = _OPERATIONS[which][0](image, magnitude)
    return image
