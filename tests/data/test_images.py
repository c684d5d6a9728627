"""Preprocessing by its definition, training's crops, and images that cannot be used."""

import io
import pickle
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import images
from clip_jax.data.images import (
    ImageError,
    Preprocess,
    center_crop,
    decode,
    preprocess,
    random_square_crop,
)


def save(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    import skimage.data

    return Image.fromarray(skimage.data.chelsea())  # 451 x 300


def normalise(pixels: Image.Image) -> np.ndarray:
    unit = np.asarray(pixels, np.float64) / 255
    return (unit - images.OPENAI_MEAN) / images.OPENAI_STD


# ------------------------------------------------------------------------------ preprocessing


def test_shorter_side_is_resized_and_the_middle_cropped(photo):
    for image, size, box in (
        (photo, (336, 224), (56, 0, 280, 224)),
        (photo.rotate(90, expand=True), (224, 336), (0, 56, 224, 280)),
        (photo.resize((451, 299)), (337, 224), (56, 0, 280, 224)),  # 56.5 goes to the even 56
        (photo.resize((455, 300)), (339, 224), (58, 0, 282, 224)),  # 57.5 to 58
    ):
        expected = normalise(image.resize(size, Image.Resampling.BICUBIC).crop(box))
        actual = preprocess(image)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_resize_comes_before_conversion_to_rgb(photo):
    palette = photo.quantize(16)
    nearest = palette.convert("RGB").resize((336, 224), Image.Resampling.NEAREST)
    expected = normalise(nearest.crop((56, 0, 280, 224)))
    np.testing.assert_allclose(preprocess(save(palette)), expected, atol=1e-6)
    assert (center_crop(decode(save(palette)), 224) != np.asarray(nearest)[:, 56:280]).any()


def test_every_way_to_give_an_image_is_the_same(photo, tmp_path):
    data = save(photo)
    (tmp_path / "a.png").write_bytes(data)
    expected = preprocess(photo)
    for image in (data, np.asarray(photo), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(preprocess(image), expected)
    gray = np.asarray(photo.convert("L"))
    np.testing.assert_array_equal(preprocess(gray), preprocess(photo.convert("L")))
    np.testing.assert_array_equal(preprocess(gray[:, :, None]), preprocess(gray))


def test_size_mean_std_and_interpolation_are_used(photo):
    half = (0.5, 0.5, 0.5)
    bilinear = photo.resize((48, 32), Image.Resampling.BILINEAR).crop((8, 0, 40, 32))
    expected = np.asarray(bilinear, np.float64) / 127.5 - 1
    actual = preprocess(photo, 32, mean=half, std=half, interpolation="bilinear")
    np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_squash_and_longest(photo):
    squashed = Preprocess(image_size=64, resize_mode="squash")(photo)
    expected = normalise(photo.resize((64, 64), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(squashed, expected, atol=1e-6)
    barred = Preprocess(image_size=64, resize_mode="longest")(photo)  # 64 x 43: bars of 10 and 11
    black = normalise(Image.new("RGB", (64, 64)))
    np.testing.assert_allclose(barred[:10], black[:10], atol=1e-6)
    np.testing.assert_allclose(barred[53:], black[53:], atol=1e-6)
    inside = normalise(photo.resize((64, 43), Image.Resampling.BICUBIC))
    np.testing.assert_allclose(barred[10:53], inside, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"), [("image_size", 0), ("std", (1.0, 0.0, 1.0)), ("resize_mode", "shorter")]
)
def test_wrong_settings_name_the_field(field, value):
    with pytest.raises((ValueError, TypeError), match=field):
        Preprocess(**{field: value})


# ---------------------------------------------------------------------------- unusual images


def test_exif_orientation_is_not_applied(photo):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = save(photo, "JPEG", exif=exif), save(photo, "JPEG")
    assert decode(turned).size == photo.size
    np.testing.assert_array_equal(decode(turned), decode(plain))
    np.testing.assert_array_equal(preprocess(turned), preprocess(plain))


def test_alpha_is_dropped_by_training_and_weighs_in_preprocessing(photo):
    transparent = photo.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(photo.size))
    np.testing.assert_array_equal(decode(save(transparent)), photo)
    # Pillow resizes RGBA with colours weighted by alpha, and OpenAI's code resizes first.
    assert np.abs(preprocess(transparent) - preprocess(photo)).max() > 0.01


def test_sixteen_bits_of_gray_are_cut_off(photo):
    deep = np.asarray(photo.convert("L"), np.uint16) * 3
    pixels = np.asarray(decode(save(Image.fromarray(deep))))
    np.testing.assert_array_equal(pixels, np.minimum(deep, 255)[:, :, None].repeat(3, axis=2))


def test_first_frame_of_an_animation_counts(photo):
    photo = photo.resize((90, 60))
    frames = [photo, photo.rotate(90), photo.rotate(180)]
    for format in ("GIF", "PNG", "TIFF"):
        data = save(frames[0], format, save_all=True, append_images=frames[1:])
        np.testing.assert_array_equal(decode(data), decode(save(photo, format)))


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("turned", [False, True])
def test_random_crop_is_any_square_of_the_resized_image(photo, turned):
    image = photo.resize((90, 60))
    image = image.rotate(90, expand=True) if turned else image
    resized = np.asarray(image.resize((32, 48) if turned else (48, 32), Image.Resampling.BICUBIC))
    squares = [resized[i : i + 32] if turned else resized[:, i : i + 32] for i in range(17)]
    rng = np.random.default_rng(0)
    crops = [random_square_crop(image, 32, rng) for _ in range(200)]
    assert crops[0].dtype == np.uint8
    places = [i for crop in crops for i, x in enumerate(squares) if np.array_equal(x, crop)]
    assert len(places) == 200
    assert set(places) == set(range(17))
    assert max(np.bincount(places)) < 30  # 12 expected of each: both ends as often as the middle


def test_crops_repeat_with_the_generator(photo):
    for scale in (None, (0.3, 0.8)):
        first, again, other = (
            random_square_crop(photo, 40, np.random.default_rng(seed), scale) for seed in (7, 7, 8)
        )
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_center_crop_is_the_middle(photo):
    resized = np.asarray(photo.resize((48, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(center_crop(photo, 32), resized[:, 8:40])


def test_random_rectangle_has_its_share_of_the_area():
    rng = np.random.default_rng(0)
    boxes = np.array([images._random_box(1000, 800, rng, (0.5, 0.9)) for _ in range(500)])
    left, top, right, bottom = boxes.T
    assert (boxes >= 0).all() & (right <= 1000).all() & (bottom <= 800).all()
    width, height = right - left, bottom - top
    share, ratio = width * height / 800_000, width / height
    assert 0.499 < share.min() < 0.52
    assert 0.85 < share.max() < 0.901
    assert 0.74 < ratio.min() < 0.8
    assert 1.28 < ratio.max() < 1.34
    assert len(set(left)) > 50
    # Of a long image, the middle.
    assert images._random_box(900, 90, rng, (0.9, 1.0)) == (390, 0, 510, 90)
    assert images._random_box(90, 900, rng, (0.9, 1.0)) == (0, 390, 90, 510)


def test_a_scale_of_one_is_the_whole_square(photo):
    square = photo.resize((100, 100))
    crop = random_square_crop(square, 32, np.random.default_rng(0), scale=(1.0, 1.0))
    whole = np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC), int)
    assert np.abs(crop - whole).mean() < 8  # a slightly oblong box may fit


# ------------------------------------------------------------------- images that cannot be used


def fails(data, reason: str) -> str:
    with pytest.raises(ImageError) as error:
        decode(data)
    assert error.value.reason == reason
    assert str(error.value).startswith(f"{reason}: ")
    with pytest.raises(ImageError):
        preprocess(data)
    return str(error.value)


def test_what_is_not_an_image(tmp_path):
    fails(b"", "empty")
    message = fails(b"<html>404</html>" * 100, "not an image")
    assert "JPEG" in message
    assert "0x" not in message  # the same text each time: skipped.jsonl is compared
    fails(bytes(5_000), "not an image")
    assert "nowhere.png" in fails(tmp_path / "nowhere.png", "unreadable")
    fails(tmp_path, "unreadable")


def test_truncated_files(photo):
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "JPEG2000", "AVIF"):
        data = save(photo, format)
        with pytest.raises(ImageError) as error:
            decode(data[: len(data) // 2])
        assert error.value.reason in ("truncated", "corrupt", "not an image"), format
    fails(save(photo, "JPEG")[:5_000], "truncated")
    fails(save(photo)[:5_000], "truncated")
    lazy = Image.open(io.BytesIO(save(photo)[:5_000]))
    with pytest.raises(ImageError, match="truncated"):
        preprocess(lazy)


def test_broken_bytes_raise_nothing_else(photo):
    rng = np.random.default_rng(0)
    small = photo.resize((45, 30))
    outcomes = {"fine": 0, "refused": 0}
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "TGA", "PCX", "ICO", "PPM"):
        data = save(small, format)
        for _ in range(30):
            broken = np.frombuffer(data, np.uint8).copy()
            places = rng.integers(0, min(broken.size, rng.choice((40, 10_000))), 5)
            broken[places] = rng.integers(0, 256, 5)
            try:
                decode(broken.tobytes())
                outcomes["fine"] += 1
            except ImageError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 25


def test_decompression_bombs(photo):
    tall = bytearray(save(photo, "BMP"))
    tall[18:26] = np.array([60_000, 60_000], "<i4").tobytes()
    tracemalloc.start()
    assert "too large" in fails(bytes(tall), "too large")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_our_limit_holds_where_pillows_was_lifted(photo):
    pixels = photo.width * photo.height
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", None):
        with mock.patch.object(images, "MAX_PIXELS", pixels - 1):
            assert "451 x 300" in fails(save(photo), "too large")
        with mock.patch.object(images, "MAX_PIXELS", pixels):
            decode(save(photo))


def test_a_sliver_needs_little_memory():
    sliver = Image.linear_gradient("L").resize((3, 200_000)).convert("RGB")
    whole = Image.Image.resize

    def resize(image, size, *args, **kwargs):
        assert size[0] * size[1] < 1 << 24  # as a whole: 224 x 14,933,333 pixels, 10 GB
        return whole(image, size, *args, **kwargs)

    with mock.patch.object(Image.Image, "resize", autospec=True, side_effect=resize):
        assert Preprocess()._resize(sliver).size == (224, 224)
        assert center_crop(sliver, 224).shape == (224, 224, 3)
        assert random_square_crop(sliver, 224, np.random.default_rng(0)).shape == (224, 224, 3)


def test_the_short_cut_for_slivers_gives_the_same_pixels(photo):
    for image in (photo, photo.rotate(90, expand=True), photo.resize((1000, 64))):
        whole = center_crop(image, 64)
        with mock.patch.object(images, "_MAX_RESIZED_PIXELS", 1):
            part = center_crop(image, 64)
        assert np.abs(whole.astype(int) - part).max() <= 1
        assert np.mean(whole == part) > 0.999


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((24, 24, 3), np.float32),
        ((24, 24, 3), np.int64),
        ((3, 24, 24), np.uint8),
        ((1, 24, 24, 3), np.uint8),
    ],
)
def test_arrays_of_another_kind_name_what_is_needed(shape, dtype):
    with pytest.raises(ImageError, match=r"not an image: array .*uint8 \[H, W, 3\]") as error:
        preprocess(np.zeros(shape, dtype))
    assert str(list(shape)) in str(error.value)


def test_empty_array():
    with pytest.raises(ImageError, match="empty"):
        preprocess(np.zeros((0, 5, 3), np.uint8))


def test_nothing_is_executed():
    """Pillow reads EPS by running Ghostscript; we don't read it."""
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    fails(header + bytes(50), "not an image")


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError("truncated", "image: 3 bytes left")))
    assert (error.reason, str(error)) == ("truncated", "truncated: image: 3 bytes left")


# ------------------------------------------------------------------------------------- warnings


def noisy_images(photo: Image.Image) -> list[bytes]:
    """Bytes that Pillow warns about: transparency in a palette, broken EXIF and TIFF entries."""
    palette = save(photo.quantize(8), transparency=bytes(range(8)))
    exif = save(photo, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x20\0" + b"\x12\x01\x03\0\xff" * 3)
    return [palette, exif]


def test_pillows_warnings_stay_inside(photo):
    with mock.patch.object(Image, "MAX_IMAGE_PIXELS", photo.width * photo.height - 1):
        with pytest.warns(Image.DecompressionBombWarning):
            Image.open(io.BytesIO(save(photo)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for data in [save(photo), *noisy_images(photo)]:
                decode(data)
                preprocess(data)
    assert not caught


def test_threads_leave_the_filters_as_they_were(photo):
    data = noisy_images(photo.resize((40, 30)))[0]
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(decode, [data] * 200))
    assert list(warnings.filters) == before
    assert images._QUIET._inside == 0
