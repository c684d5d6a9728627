"""Augmentations of images: optional ones in training, and stored ones that are replayed.

In training all are off by default, as in CLIP; the colours are those of SimCLR, appendix A. The
operations are RandAugment's (1909.13719), with the magnitudes, the order and the pixels of
torchvision. A stored augmentation is replayed as in MobileCLIP (2311.17049): crop, resize, flip,
operations.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageOps

from clip_jax.data.images import ImageLike, decode, random_box
from clip_jax.data.sources import SampleError
from clip_jax.errors import InputError, check_ranges
from clip_jax.models.images import ImageSpec


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
    """Augmentations that are drawn once for each image, stored and replayed in training."""

    # Smallest and largest share of the area that a crop has.
    crop_scale: tuple[float, float] = (0.08, 1.0)
    flip: float = 0.0  # Probability of mirroring; avoid it if captions say left or right.
    operations: int = 2  # Number of RandAugment's operations for each augmentation.
    size: int = 224  # Side of the images to which magnitudes in pixels refer: the student's.

    def __post_init__(self) -> None:
        where = "augmentations."
        check_ranges(self, where, flip="[0, 1]", operations="[0, inf)", size="[1, inf)")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise InputError(
                f"{where}crop_scale={self.crop_scale} must be two numbers in (0, 1], the smaller "
                "one first."
            )


@dataclass(frozen=True)
class Augmentation:
    """One augmentation of one image, as it is stored."""

    box: tuple[int, int, int, int] | None = None  # top, left, height, width; None: the full image
    flip: bool | None = None  # None: the set has no flips, and stores none
    operations: tuple[tuple[int, float] | None, ...] = ()  # index in `_OPERATIONS`, magnitude


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


# ------------------------------------------------------------------------ stored augmentations


def draw(
    width: int, height: int, rng: np.random.Generator, config: AugmentationsConfig
) -> Augmentation:
    """Draw an augmentation for an image of this size."""
    left, top, right, bottom = random_box(width, height, rng, config.crop_scale)
    flip = bool(rng.random() < config.flip) if config.flip else None
    operations = _draw_operations(rng, config.operations, config.size)
    return Augmentation((top, left, bottom - top, right - left), flip, operations)


def replay(
    data: ImageLike, one: Augmentation, specs: Sequence[ImageSpec], size: int | None = None
) -> list[UInt8[np.ndarray, "_H _W 3"]]:
    """Decode an image and apply a stored augmentation, once for each resolution.

    Magnitudes in pixels refer to images of `size` pixels; without it, of the first of `specs`.
    Raises ImageError, and SampleError if the augmentation does not fit the image.
    """
    image = decode(data)
    top, left, height, width = one.box or (0, 0, image.height, image.width)
    inside = 0 <= top < top + height <= image.height and 0 <= left < left + width <= image.width
    if not inside:
        raise SampleError(
            f"augmentation: the box at row {top}, column {left} of {height} x {width} pixels is "
            f"not inside the image of {image.height} x {image.width}: it belongs to another image"
        )
    image = image.crop((left, top, left + width, top + height))
    sides = [spec.fit(width, height) for spec in specs]
    size = size or specs[0].side
    views = {}
    for side in set(sides):
        view = image.resize(side, Image.Resampling.BICUBIC)
        if one.flip:
            view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        views[side] = np.array(_apply(view, one.operations, size))
    return [views[side] for side in sides]


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix)  # nearest, black outside


# With the rounding of torchvision, which takes the tangent of an angle in degrees.
def _shear_x(image: Image.Image, magnitude: float) -> Image.Image:
    angle = math.radians(math.degrees(math.atan(magnitude)))
    return _affine(image, 1, math.tan(angle), 0, 0, 1, 0)


def _shear_y(image: Image.Image, magnitude: float) -> Image.Image:
    angle = math.radians(math.degrees(math.atan(magnitude)))
    return _affine(image, 1, 0, 0, math.sin(angle) / math.cos(angle), 1, 0)


_Operation = Callable[[Image.Image, float], Image.Image]
# By the ids of stored augmentations: the operation, its largest magnitude of `_LEVELS`, and whether
# its sign is drawn. That of a translation is a share of the image's side.
_OPERATIONS: tuple[tuple[_Operation, float, bool], ...] = (
    (lambda image, _: image, 0.0, False),
    (_shear_x, 0.3, True),
    (_shear_y, 0.3, True),
    (lambda image, by: _affine(image, 1, 0, -int(by), 0, 1, 0), 150 / 331, True),
    (lambda image, by: _affine(image, 1, 0, 0, 0, 1, -int(by)), 150 / 331, True),
    (lambda image, by: image.rotate(by), 30.0, True),
    (lambda image, by: ImageEnhance.Brightness(image).enhance(1 + by), 0.9, True),
    (lambda image, by: ImageEnhance.Color(image).enhance(1 + by), 0.9, True),
    (lambda image, by: ImageEnhance.Contrast(image).enhance(1 + by), 0.9, True),
    (lambda image, by: ImageEnhance.Sharpness(image).enhance(1 + by), 0.9, True),
    (lambda image, by: ImageOps.posterize(image, int(by)), 4.0, False),
    (lambda image, by: ImageOps.solarize(image, math.ceil(by)), 255.0, False),
    (lambda image, _: ImageOps.autocontrast(image), 0.0, False),
    (lambda image, _: ImageOps.equalize(image), 0.0, False),
)
OPERATIONS = len(_OPERATIONS)
_TRANSLATE_X, _TRANSLATE_Y, POSTERIZE, _SOLARIZE = 3, 4, 10, 11
_LEVELS = 31  # of magnitude, as in torchvision


def _draw_operations(
    rng: np.random.Generator, count: int, size: int
) -> tuple[tuple[int, float], ...]:
    """Draw operations and magnitudes uniformly from RandAugment's space, as torchvision has it."""
    operations = []
    for _ in range(count):
        which, level, negative = rng.integers((OPERATIONS, _LEVELS, 2)).tolist()
        _, largest, signed = _OPERATIONS[which]
        magnitude = largest * level / (_LEVELS - 1)
        if which in (_TRANSLATE_X, _TRANSLATE_Y):
            magnitude *= size
        elif which == POSTERIZE:  # bits that remain
            magnitude = 8.0 - round(magnitude)
        elif which == _SOLARIZE:  # threshold
            magnitude = largest - magnitude
        operations.append((which, -magnitude if signed and negative else magnitude))
    return tuple(operations)


def _apply(
    image: Image.Image, operations: Sequence[tuple[int, float] | None], size: int
) -> Image.Image:
    """Apply operations whose translations refer to an image of `size` pixels."""
    for which, magnitude in filter(None, operations):
        if which in (_TRANSLATE_X, _TRANSLATE_Y):
            magnitude *= image.size[which - _TRANSLATE_X] / size
        image = _OPERATIONS[which][0](image, magnitude)
    return image
