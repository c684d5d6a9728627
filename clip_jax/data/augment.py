"""What may be done to a crop besides cropping (SimCLR, appendix A; off by default, as in CLIP)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

from clip_jax.errors import check_ranges


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Probabilities, and how strong the jitter is."""

    flip: float = 0.0  # probability of a mirror image; captions may say left and right
    color_jitter: float = 0.0  # probability; SimCLR has 0.8
    brightness: float = 0.4  # jitter: factors between 1 - x and 1 + x
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1  # jitter: turns of the colour circle, at most 0.5
    grayscale: float = 0.0  # probability; SimCLR has 0.2

    def __post_init__(self) -> None:
        names = ("flip", "color_jitter", "grayscale", "brightness", "contrast", "saturation")
        check_ranges(self, "data.augment.", **dict.fromkeys(names, "[0, 1]"), hue="[0, 0.5]")


def augment(
    pixels: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator, config: AugmentConfig
) -> UInt8[np.ndarray, "H W 3"]:
    """Draw from `rng` only for what is on, so that switching one thing on leaves others alone."""
    if config.flip and rng.random() < config.flip:
        pixels = np.ascontiguousarray(pixels[:, ::-1])
    if config.color_jitter and rng.random() < config.color_jitter:
        pixels = np.array(_jitter(Image.fromarray(pixels), rng, config))
    if config.grayscale and rng.random() < config.grayscale:
        pixels = np.array(Image.fromarray(pixels).convert("L").convert("RGB"))
    return pixels


def _jitter(image: Image.Image, rng: np.random.Generator, config: AugmentConfig) -> Image.Image:
    """Brightness, contrast, saturation and hue, in random order."""
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
