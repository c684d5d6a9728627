"""Augmentations, and how little scaled decoding changes a crop."""

import io

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.augment import AugmentConfig, augment
from clip_jax.data.images import center_crop, decode, random_square_crop, read_crop


@pytest.fixture(scope="module")
def photo():
    import skimage.data

    return Image.fromarray(skimage.data.astronaut())  # 512 x 512


@pytest.fixture(scope="module")
def pixels(photo):
    return np.asarray(photo.resize((64, 64)))


def jpeg(image, quality=92):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def psnr(a, b):
    return -10 * np.log10(np.mean((a / 255.0 - b / 255.0) ** 2) + 1e-9)


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


@pytest.mark.parametrize("wrong", [{"flip": 1.1}, {"hue": 0.6}, {"contrast": -0.1}])
def test_wrong_config(wrong):
    with pytest.raises(ValueError, match=f"data.augment.{next(iter(wrong))}"):
        AugmentConfig(**wrong)


@pytest.mark.parametrize("scale", [None, (0.3, 1.0)])
def test_without_scaled_decoding_it_is_decode_and_crop(scale, photo):
    data = jpeg(photo.resize((640, 480)))
    found = read_crop(data, 64, np.random.default_rng(1), scale, scaled=False)
    wanted = random_square_crop(decode(data), 64, np.random.default_rng(1), scale)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(read_crop(data, 64, scaled=False), center_crop(decode(data), 64))


@pytest.mark.parametrize("size", [(640, 480), (1001, 701), (480, 640)])
def test_scaled_decoding_is_not_visible(size, photo):
    """Nearer to the exact crop than one filter (Lanczos) is to another (bicubic), or than 36 dB."""
    data = jpeg(photo.resize(size, Image.Resampling.LANCZOS))
    for scale in (None, (0.9, 1.0), (0.3, 1.0)):
        for seed in range(3):
            exact = read_crop(data, 224, np.random.default_rng(seed), scale, scaled=False)
            assert psnr(read_crop(data, 224, np.random.default_rng(seed), scale), exact) > 36
    assert (read_crop(data, 224) != read_crop(data, 224, scaled=False)).any()  # it did something


def test_small_jpegs_and_other_formats_are_decoded_in_full(photo):
    file = io.BytesIO()
    photo.save(file, "PNG")
    for data in (jpeg(photo.resize((447, 600))), file.getvalue()):
        exact = read_crop(data, 224, np.random.default_rng(0), scaled=False)
        np.testing.assert_array_equal(read_crop(data, 224, np.random.default_rng(0)), exact)
