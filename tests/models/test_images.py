"""Patches of images are normalised as their pixels are."""

import numpy as np

from clip_jax.models import images as images_of
from clip_jax.models.images import NaFlex, Square


def test_patches_are_normalised_as_their_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (1, 16, 12, 3), np.uint8)
    spec = NaFlex(24, 4)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    square = Square(16).pack(pixels)
    assert square is pixels
    packed = images_of.normalize(spec.pack(pixels), mean, std)
    by_pixel = spec.pack(images_of.normalize(square, mean, std))
    np.testing.assert_array_equal(packed.pixels[:, :12], by_pixel.pixels[:, :12])
    assert images_of.is_normalized(packed)
    assert not images_of.is_normalized(square)
