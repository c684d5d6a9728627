import io
import re
import sys
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.augment import AugmentConfig
from clip_jax.data.images import ImageError, View, read_crops, read_views
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.turbo import TurboImage, decode, size_of
from clip_jax.errors import InputError
from clip_jax.models.images import NaFlex, Square
from clip_jax.models.inputs import ViewInput
from tests.data import conftest as made
from tests.data.conftest import take

KINDS = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "progressive": {"progressive": True},
    "coarse": {"quality": 20},
    "gray": {"mode": "L"},
}
SQUEEZED = (0.3, 1.0)


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    import skimage.data

    return Image.fromarray(skimage.data.chelsea())  # 451 x 300


def save(image: Image.Image, format: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    file = io.BytesIO()
    image.convert(mode).save(file, format, **options)
    return file.getvalue()


def assert_close(found, wanted):
    """At most 2 of 255 levels apart, in less than 3% of the values."""
    difference = np.abs(np.asarray(found, int) - np.asarray(wanted, int))
    assert difference.max() <= 2
    assert (difference > 0).mean() < 0.03


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_jpegs_are_decoded_as_by_pillow(kind, factor, photo):
    data = save(photo, **KINDS[kind])
    with Image.open(io.BytesIO(data)) as image:
        image.draft(None, (451 // factor, 300 // factor))
        wanted = np.asarray(image.convert("RGB"))
    assert wanted.shape == (-(-300 // factor), -(-451 // factor), 3)
    assert size_of(data) == (451, 300)
    found = decode(data, (451, 300), factor)
    np.testing.assert_array_equal(np.asarray(found), wanted)


def resize_rows_first(image, size, how, box=None):
    """Resize by Pillow in two steps, since Pillow 13 may begin with the columns."""
    left, top, right, bottom = box or (0, 0, *image.size)
    width, _ = size
    narrow = image.resize((width, image.height), how, box=(left, 0, right, image.height))
    return narrow.resize(size, how, box=(0, top, width, bottom))


@pytest.mark.parametrize("how", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
@pytest.mark.parametrize("content", ["photo", "black and white noise"])
def test_images_are_resized_as_by_pillow(how, content, photo):
    rng = np.random.default_rng(0)
    if content != "photo":
        photo = Image.fromarray(rng.integers(0, 2, (300, 451, 3), np.uint8) * 255)
    image = TurboImage(np.asarray(photo))
    boxes = [
        None,
        (0, 0, 451, 300),
        (50, 20, 300, 280),
        (0.5, 3.25, 33.3, 299.9),
        (200, 100, 203, 103),
    ]
    for box in boxes:
        for size in ((224, 224), (16, 30), (451, 300), (600, 40), (7, 500)):
            assert_close(image.resize(size, how, box=box), resize_rows_first(photo, size, how, box))


@pytest.mark.parametrize("scale", [None, SQUEEZED])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "gray JPEG", "CMYK JPEG", "palette PNG"])
def test_crops_are_those_of_pillow(scale, format, photo):
    mode = {"gray": "L", "CMYK": "CMYK", "palette": "P"}.get(format.split()[0], "RGB")
    data = save(photo.resize((900, 600)), format.split()[-1], mode)
    specs = [Square(64), Square(250), NaFlex(49, 16)]
    for scaled, seed in ((True, None), (True, 0), (True, 1), (False, 2)):
        crops = {
            decoder: read_crops(
                data,
                specs,
                None if seed is None else np.random.default_rng(seed),
                scale,
                scaled=scaled,
                decoder=decoder,
            )
            for decoder in ("pillow", "turbo")
        }
        for found, wanted in zip(crops["turbo"], crops["pillow"], strict=True):
            assert_close(found, wanted)


def test_views_are_those_of_pillow(photo):
    def views():
        areas = ((1, 1), (0.25, 0.3), (0.05, 0.3))
        return [View(Square(64), area, np.random.default_rng(3)) for area in areas]

    for source in (save(photo.resize((900, 600))), np.asarray(photo), photo):
        wanted = read_views(source, views())
        found = read_views(source, views(), decoder="turbo")
        for x, y in zip(found, wanted, strict=True):
            assert_close(x, y)
            assert x.flags.writeable


def test_an_image_is_decoded_once_for_inputs_that_need_the_same_fraction(photo):
    data = save(photo.resize((900, 600)))
    with mock.patch("clip_jax.data.turbo.decode", side_effect=decode) as decoded:
        read_crops(data, [Square(100), Square(120), Square(300)], decoder="turbo")
    assert [call.args[2] for call in decoded.call_args_list] == [4, 2]


def test_damaged_images_are_refused_as_by_pillow(photo):
    data = save(photo)
    for bad in (data[:2000], data[: len(data) // 2], b"", b"text", data[:100] + data[5000:]):
        errors = []
        for decoder in ("pillow", "turbo"):
            with pytest.raises(ImageError) as error:
                read_crops(bad, [Square(64)], decoder=decoder)
            errors.append((error.value.reason, str(error.value)))
        assert errors[0] == errors[1]
    with mock.patch("clip_jax.data.images.MAX_PIXELS", 1000), pytest.raises(ImageError) as error:
        read_crops(data, [Square(64)], decoder="turbo")
    assert error.value.reason == "too large"


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_the_crops_of_pillow(workers, tmp_path, photo):
    pairs = [
        (name, save(photo.resize((400 + 10 * i, 300))), caption)
        for i, (name, _, caption) in enumerate(made.make_pairs(24))
    ]
    source = made.tar(tmp_path, pairs)
    inputs = {"view": ViewInput(Square(32), area=(0.2, 0.4), count=2)}
    batches = {
        decoder: take(
            DataConfig(
                source=source,
                crop_scale=SQUEEZED,
                decoder=decoder,
                workers=workers,
                augment=AugmentConfig(flip=0.5),
            ),
            2,
            inputs=inputs,
        )
        for decoder in ("pillow", "turbo")
    }
    for found, wanted in zip(batches["turbo"], batches["pillow"], strict=True):
        assert found.keys == wanted.keys
        for name in ("image", "view"):
            assert_close(found.arrays[name], wanted.arrays[name])


def test_settings_that_cannot_be_are_refused(tmp_path):
    source = made.tar(tmp_path, made.make_pairs(24))
    with pytest.raises(InputError, match="turbo does not read stored augmentations"):
        DataConfig(source=source, decoder="turbo", crop="stored")
    without = mock.patch.dict(sys.modules, {"cykooz_resizer": None})
    message = "data.decoder=turbo needs an extra: pip install 'clip-jax-pods[turbo]', or set "
    with without, pytest.raises(InputError, match=re.escape(message)):
        take(DataConfig(source=source, decoder="turbo"), 1)
