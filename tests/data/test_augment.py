"""Augmentations of a crop: each alone, and none by default; stored ones, drawn and replayed.

Their pixels are compared with torchvision's in tests/reference.
"""

import io
import re

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.augment import (
    Augmentation,
    AugmentationsConfig,
    AugmentConfig,
    augment,
    draw,
    replay,
)
from clip_jax.data.sources import SampleError
from clip_jax.models.images import NaFlex, Square
from clip_jax.models.vit import ViTConfig


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


# ------------------------------------------------------------------------ stored augmentations


@pytest.fixture(scope="module")
def png(pixels):
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def test_what_is_drawn_depends_on_the_generator_alone():
    config = AugmentationsConfig(smallest_crop=0.25, flip=0.5, operations=3, size=32)
    drawn = [draw(80, 60, np.random.default_rng(i), config) for i in range(200)]
    assert drawn == [draw(80, 60, np.random.default_rng(i), config) for i in range(200)]
    boxes = np.array([augmentation.box for augmentation in drawn])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= (60, 80)).all()
    assert 0.24 < boxes[:, 2:].prod(1).min() / 4800 < 0.3
    assert 60 < sum(augmentation.flip is True for augmentation in drawn) < 140
    assert {len(augmentation.operations or ()) for augmentation in drawn} == {3}
    without = AugmentationsConfig(operations=0)
    assert draw(80, 60, np.random.default_rng(0), without).operations == ()
    assert draw(80, 60, np.random.default_rng(0), without).flip is None


def test_translations_are_drawn_for_images_of_the_default_models_size():
    """Unless a size is set: up to 150 of the 331 pixels of AutoAugment's images."""
    side = ViTConfig().image_size
    for config, size in ((AugmentationsConfig(), side), (AugmentationsConfig(size=32), 32)):
        drawn = [draw(80, 60, np.random.default_rng(i), config).operations for i in range(1_000)]
        operations = [operation for each in drawn for operation in each or () if operation]
        pixels = [abs(magnitude) for which, magnitude in operations if which in (3, 4)]
        assert max(pixels) == pytest.approx(150 / 331 * size)


@pytest.mark.parametrize("value", [{"smallest_crop": 0}, {"flip": 2}, {"size": 0}])
def test_what_cannot_be_drawn_is_refused(value):
    with pytest.raises(ValueError, match=rf"augmentations\.{next(iter(value))}="):
        AugmentationsConfig(**value)


def test_each_input_is_the_same_crop_at_its_own_resolution(pixels, png):
    """And magnitudes in pixels are scaled with it."""
    augmentation = Augmentation((4, 8, 32, 48), True, ((3, -8.0), None, (4, 4.0)))
    views = replay(png, augmentation, [Square(32), Square(64), NaFlex(24, 8)], 32)
    crop = Image.fromarray(pixels[4:36, 8:56])
    for view, (width, height), right, down in (
        (views[0], (32, 32), -8, 4),
        (views[1], (64, 64), -16, 8),
        (views[2], (48, 32), -12, 4),
    ):
        flipped = np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC))[:, ::-1]
        expected = np.zeros_like(flipped)
        expected[down:, : width + right] = flipped[: height - down, -right:]
        np.testing.assert_array_equal(view, expected)
    alone = replay(png, augmentation, [Square(64)])  # magnitudes of the first input
    np.testing.assert_array_equal(alone[0][:4], 0)
    assert alone[0][4:].any(axis=(1, 2)).all()


@pytest.mark.parametrize(
    "box",
    [(0, 0, 65, 64), (1, 0, 64, 64), (0, 30, 9, 40), (-1, 0, 9, 9), (0, 0, 0, 9), (0, 0, 9, 0)],
)
def test_a_box_of_another_image_is_a_sample_that_is_skipped(box, png):
    message = f"augmentation: the box of {box[3]} x {box[2]} pixels .*not inside the image of 64 x"
    with pytest.raises(SampleError, match=re.escape(message).replace(r"\.\*", ".*")):
        replay(png, Augmentation(box), [Square(32)])


def test_operations_in_training_are_scaled_to_each_input(pixels):
    config = AugmentConfig(operations=2)
    views = [augment(pixels, np.random.default_rng(i), config) for i in range(20)]
    assert sum((view != pixels).any() for view in views) > 12
    np.testing.assert_array_equal(views[3], augment(pixels, np.random.default_rng(3), config))
    large = np.asarray(Image.fromarray(pixels).resize((128, 128)))
    for i in range(40):
        scaled, drawn = (augment(large, np.random.default_rng(i), config, x) for x in (64, 128))
        np.testing.assert_array_equal(scaled, drawn)
