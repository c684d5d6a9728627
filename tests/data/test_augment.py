"""Augmentations of a crop: each alone, and none by default."""

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.augment import AugmentConfig, augment


@pytest.fixture(scope="module")
def pixels():
    import skimage.data

    return np.asarray(Image.fromarray(skimage.data.astronaut()).resize((64, 64)))


def test_all_is_off_by_default_and_draws_nothing(pixels):
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(augment(pixels, rng, AugmentConfig()), pixels)
    assert rng.random() == np.random.default_rng(0).random()


def test_flip_and_grayscale(pixels):
    flipped = augment(pixels, np.random.default_rng(0), AugmentConfig(flip=1.0))
    np.testing.assert_array_equal(flipped, pixels[:, ::-1])
    gray = augment(pixels, np.random.default_rng(0), AugmentConfig(grayscale=1.0))
    np.testing.assert_array_equal(gray, Image.fromarray(pixels).convert("L").convert("RGB"))
    halves = [
        (augment(pixels[:8], np.random.default_rng(i), AugmentConfig(flip=0.5)) != pixels[:8]).any()
        for i in range(100)
    ]
    assert 30 < sum(halves) < 70


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_does_its_own(name, pixels):
    off = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    config = AugmentConfig(color_jitter=1.0, **(off | {name: 0.3}))
    changed = [augment(pixels, np.random.default_rng(i), config) for i in range(3)]
    still = augment(pixels, np.random.default_rng(0), AugmentConfig(color_jitter=1.0, **off))
    assert np.abs(still.astype(int) - pixels).mean() < 2  # through HSV and back
    assert all(np.abs(image.astype(int) - still).mean() > 2 for image in changed)
    again = augment(pixels, np.random.default_rng(0), config)
    np.testing.assert_array_equal(again, changed[0])
