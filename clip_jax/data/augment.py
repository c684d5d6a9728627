"""Optional augmentations of a crop (SimCLR, appendix A); all are off by default, as in CLIP."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from clip_jax.errors import check_ranges


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

    def __post_init__(self) -> None:
        names = ("flip", "color_jitter", "grayscale", "brightness", "contrast", "saturation")
        check_ranges(self, "data.augment.", **dict.fromkeys(names, "[0, 1]"), hue="[0, 0.5]")


def augment(
    pixels: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator, config: AugmentConfig
) -> UInt8[np.ndarray, "H W 3"]:
    """Apply the enabled augmentations; a disabled one draws nothing from `rng`."""
    if config.flip and rng.random() < config.flip:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
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
