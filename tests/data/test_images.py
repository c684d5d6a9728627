"""Preprocessing by its definition, training's crops, and images that cannot be used."""

import io
import itertools
import pickle
import runpy
import threading
import tracemalloc
import warnings
from unittest import mock

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import images
from clip_jax.data.images import (
    ImageError,
    Preprocess,
    View,
    center_crop,
    complete,
    decode,
    read_ahead,
    read_crops,
    read_views,
)
from clip_jax.models.images import NaFlex, Square


def save(image: Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    if format == "PNG":
        options = {"compress_level": 1} | options
    image.save(file, format, **options)
    return file.getvalue()


def test_only_formats_that_this_build_of_pillow_has_are_read():
    """It may lack libraries; Pillow raises KeyError for a format that it does not know."""
    before = images._formats.__wrapped__()
    assert {"JPEG", "PNG", "WEBP"} <= {*before} <= {*images.FORMATS}
    with mock.patch.dict(Image.OPEN):
        del Image.OPEN["WEBP"]
        assert images._formats.__wrapped__() == tuple(name for name in before if name != "WEBP")


def read_crop(data, spec, *args, **options):
    return read_crops(data, [spec], *args, **options)[0]


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
        actual = Preprocess()(image)
        assert actual.dtype == np.float32
        np.testing.assert_allclose(actual, expected, atol=1e-6)


def test_size_mean_std_and_interpolation_are_used(photo):
    half = (0.5, 0.5, 0.5)
    bilinear = photo.resize((48, 32), Image.Resampling.BILINEAR).crop((8, 0, 40, 32))
    expected = np.asarray(bilinear, np.float64) / 127.5 - 1
    actual = Preprocess(image_size=32, mean=half, std=half, interpolation="bilinear")(photo)
    np.testing.assert_allclose(actual, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("field", "value"), [("image_size", 0), ("std", (1.0, 0.0, 1.0)), ("resize_mode", "shorter")]
)
def test_wrong_settings_name_the_field(field, value):
    with pytest.raises((ValueError, TypeError), match=field):
        Preprocess(**{field: value})


# ------------------------------------------------------------------------------------- training


def test_training_ignores_exif_and_alpha_cuts_off_sixteen_bits_and_takes_the_first_frame(photo):
    """As preprocessing does, which `tests/reference` compares with OpenAI's."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    plain = decode(save(photo, "JPEG"))
    np.testing.assert_array_equal(decode(save(photo, "JPEG", exif=exif)), plain)
    transparent = photo.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(photo.size))
    np.testing.assert_array_equal(decode(save(transparent)), photo)
    deep = np.asarray(photo.convert("L"), np.uint16) * 3
    pixels = np.asarray(decode(save(Image.fromarray(deep))))
    np.testing.assert_array_equal(pixels, np.minimum(deep, 255)[:, :, None].repeat(3, axis=2))
    for format in ("GIF", "PNG", "TIFF"):
        data = save(photo, format, save_all=True, append_images=[photo.rotate(90)])
        np.testing.assert_array_equal(decode(data), decode(save(photo, format)))


def test_random_crop_is_any_square_of_the_resized_image(photo):
    image = photo.resize((90, 60))
    resized = np.asarray(image.resize((48, 32), Image.Resampling.BICUBIC))
    squares = [resized[:, i : i + 32] for i in range(17)]
    rng = np.random.default_rng(0)
    data = save(image)
    crops = [read_crop(data, Square(32), rng) for _ in range(200)]
    assert crops[0].dtype == np.uint8
    places = [i for crop in crops for i, x in enumerate(squares) if np.array_equal(x, crop)]
    assert len(places) == 200
    assert set(places) == set(range(17))
    assert max(np.bincount(places)) < 30  # 12 expected of each: both ends as often as the middle


def test_random_rectangle_has_its_share_of_the_area():
    rng = np.random.default_rng(0)
    boxes = np.array([images.random_box(1000, 800, rng, (0.5, 0.9)) for _ in range(500)])
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
    assert images.random_box(900, 90, rng, (0.9, 1.0)) == (390, 0, 510, 90)
    assert images.random_box(90, 900, rng, (0.9, 1.0)) == (0, 390, 90, 510)
    # Relative to its own aspect ratio, a box of a long image has other places and shapes.
    boxes = np.array([images.random_box(900, 90, rng, (0.7, 1.0), 10.0) for _ in range(500)])
    ratio = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    assert 7.4 < ratio.min() < 8.5
    assert 11.5 < ratio.max() < 13.6
    assert len({*boxes[:, 0]}) > 50


@pytest.mark.parametrize("scale", [None, (0.3, 1.0)])
def test_what_is_not_decoded_at_a_fraction_is_decoded_and_cropped(scale, photo):
    """Where that is off, for small JPEGs, and for other formats."""
    small, large = (photo.resize(size) for size in ((447, 600), (640, 480)))
    cases = ((large, "JPEG", False), (small, "JPEG", True), (large, "PNG", True))
    for image, format, scaled in cases:
        data = save(image, format)
        found = read_crop(data, Square(224), np.random.default_rng(1), scale, scaled=scaled)
        lossless = save(decode(data))
        wanted = read_crop(lossless, Square(224), np.random.default_rng(1), scale)
        np.testing.assert_array_equal(found, wanted)
        middle = read_crop(data, Square(224), scaled=scaled)
        np.testing.assert_array_equal(middle, center_crop(decode(data), 224))


@pytest.mark.parametrize("scale", [None, (0.3, 1.0)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_inputs_of_other_resolutions_get_the_same_box(scale, seed, photo):
    """Resized from the image, and not from the first input's crop."""
    data, specs = save(photo), [Square(64), Square(150), NAFLEX]
    rng = None if seed is None else np.random.default_rng(seed)
    crops = read_crops(data, specs, rng, scale)
    again = None if seed is None else np.random.default_rng(seed)
    np.testing.assert_array_equal(crops[0], read_crop(data, Square(64), again, scale))
    if seed is not None and scale:
        box = images.random_box(*photo.size, np.random.default_rng(seed), scale)
        image, box = photo.crop(box), None
    else:  # a square whose offset is a number of pixels after resizing, of which it has 96
        offset = 16 if seed is None else int(np.random.default_rng(seed).integers(96 - 64 + 1))
        image, box = photo, (offset * 451 / 96, 0, (offset + 64) * 451 / 96, 300)
    size = NAFLEX.fit(round(box[2] - box[0]), 300) if box else NAFLEX.fit(*image.size)
    for crop, wanted in ((crops[1], (150, 150)), (crops[2], size)):
        expected = image.resize(wanted, Image.Resampling.BICUBIC, box=box)
        np.testing.assert_array_equal(crop, expected)


def test_each_resolution_is_decoded_at_the_fraction_that_it_needs(photo):
    data, scale = save(photo.resize((1200, 900)), "JPEG"), (0.8, 1.0)
    sides = (112, 448)
    together = read_crops(data, [*map(Square, sides)], np.random.default_rng(0), scale)
    for side, crop in zip(sides, together, strict=True):
        alone = read_crop(data, Square(side), np.random.default_rng(0), scale)
        np.testing.assert_array_equal(crop, alone)


def test_views_are_boxes_of_the_image_which_is_decoded_once_for_the_most_detailed(photo):
    data, rng = save(photo.resize((1200, 900)), "JPEG"), np.random.default_rng
    views = [View(Square(64), (1, 1), rng(0)), View(Square(64), (0.25, 0.3), rng(1))]
    with mock.patch.object(images, "opened", side_effect=images.opened) as opened:
        complete, crop = read_views(data, views)
    assert opened.call_count == 1
    decoded = decode(data)
    with Image.open(io.BytesIO(data)) as reduced:
        reduced.draft(None, (300, 225))  # 64 pixels of the smaller crop are 1/4 of the image
        half = reduced.convert("RGB")
    assert half.size == (300, 225)
    box = images.random_box(1200, 900, rng(1), (0.25, 0.3))
    small = tuple(edge / 4 for edge in box)
    how = Image.Resampling.BICUBIC
    np.testing.assert_array_equal(complete, half.resize((64, 64), how, box=(0, 0, 300, 225)))
    np.testing.assert_array_equal(crop, half.resize((64, 64), how, box=small))
    views = [View(Square(64), (0.25, 0.3), rng(1))]
    [exact] = read_views(data, views, scaled=False)
    np.testing.assert_array_equal(exact, decoded.crop(box).resize((64, 64), how))
    [of_array] = read_views(np.array(decoded), [View(Square(64), (0.25, 0.3), rng(1))])
    np.testing.assert_array_equal(of_array, exact)


@pytest.mark.parametrize("size", [(640, 480), (1001, 701), (480, 640)])
def test_scaled_decoding_is_not_visible(size):
    """Nearer to the exact crop than one filter (Lanczos) is to another (bicubic), or than 36 dB."""
    import skimage.data

    photo = Image.fromarray(skimage.data.astronaut())  # 512 x 512
    data = save(photo.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=92)
    for scale, seed in itertools.product((None, (0.9, 1.0), (0.3, 1.0)), range(3)):
        exact = read_crop(data, Square(224), np.random.default_rng(seed), scale, scaled=False)
        found = read_crop(data, Square(224), np.random.default_rng(seed), scale)
        squared = np.mean((found / 255.0 - exact / 255.0) ** 2)
        assert -10 * np.log10(squared + 1e-9) > 36  # PSNR
    exact = read_crop(data, Square(224), scaled=False)
    assert (read_crop(data, Square(224)) != exact).any()  # it did something


# ------------------------------------------------------------------- any aspect ratio (NaFlex)

NAFLEX = NaFlex(64, 16)
SHAPES = {"photo": (451, 300), "row": (1000, 1), "column": (1, 1000), "pixel": (1, 1)}


def triangles(count: int, size: int) -> np.ndarray:
    """The weights [size, count] by which TensorFlow resizes `count` pixels to `size`, in float64:
    a triangle, stretched if there are fewer, around each new pixel's middle."""
    scale = count / size
    middle = (np.arange(size) + 0.5) * scale
    distance = np.abs(np.arange(count) + 0.5 - middle[:, None]) / max(scale, 1)
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(1, keepdims=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_tensorflows_rule_is_a_triangle_filter_in_floats(photo, shape):
    """Rounded once, to the nearest; Pillow rounds between rows and columns, too."""
    image = photo.resize(SHAPES[shape], Image.Resampling.LANCZOS)
    image.putalpha(image.convert("L"))  # dropped, as TensorFlow's decoder does
    options = {"resize_mode": "naflex", "max_patches": 64, "patch_size": 16}
    preprocess = Preprocess(rules="tensorflow", interpolation="bilinear", **options)
    pixels = preprocess.pixels(image)
    assert pixels.shape[1::-1] == NAFLEX.fit(*image.size)
    down, across = map(triangles, image.size[::-1], pixels.shape)
    original = np.asarray(image.convert("RGB"), np.float64)
    exact = np.einsum("hy,wx,yxc->hwc", down, across, original, optimize=True)
    assert np.abs(pixels - exact).max() <= 0.5 + 1e-3
    if shape == "photo":
        pillow = Preprocess(interpolation="bilinear", **options).pixels(image)
        assert 0.5 + 1e-3 < np.abs(pillow - exact).max() < 1.5


def test_tensorflows_rule_has_every_resize_mode(photo):
    for mode in ("shortest", "squash", "longest"):
        ours, theirs = (
            Preprocess(image_size=50, resize_mode=mode, rules=rules, fill=9).pixels(photo)
            for rules in ("tensorflow", "transformers")
        )
        difference = np.abs(ours.astype(int) - theirs)
        assert 0 < difference.max() <= 2  # bicubic overshoots; Pillow cuts that off between passes


@pytest.mark.parametrize("rules", ["openai", "transformers"])
def test_naflex_preprocessing_takes_any_mode_and_size(photo, rules):
    preprocess = Preprocess(
        resize_mode="naflex", max_patches=64, patch_size=16, rules=rules, interpolation="bilinear"
    )
    transparent = photo.copy()
    transparent.putalpha(Image.linear_gradient("L").resize(photo.size))
    white = Image.new("RGBA", photo.size, "white")
    over = Image.alpha_composite(white, transparent).convert("RGB")
    kinds = {
        "gray": (photo.convert("L"), photo.convert("L").convert("RGB")),
        "palette": (photo.convert("P"), photo.convert("P").convert("RGB")),
        "alpha": (transparent, photo if rules == "openai" else over),
        "row": (photo.resize((1000, 1)), photo.resize((1000, 1))),
        "column": (photo.resize((1, 1000)), photo.resize((1, 1000))),
        "pixel": (photo.resize((1, 1)), photo.resize((1, 1))),
        "sliver": (photo.resize((33_333, 1)), photo.resize((33_333, 1))),
    }
    for name, (image, plain) in kinds.items():
        size = NAFLEX.fit(*image.size)
        expected = np.asarray(plain.resize(size, Image.Resampling.BILINEAR))
        batch = preprocess.batch(save(image))
        wanted = NAFLEX.pack(expected[None])
        np.testing.assert_array_equal(batch.pixels, wanted.pixels, err_msg=name)
        assert batch.pixels.shape == (1, 64, 16 * 16 * 3)
        assert batch.length == batch.grid.prod() <= 64
        assert preprocess(image).shape == (*size[::-1], 3)


@pytest.mark.parametrize("scale", [None, (0.3, 1.0)])
@pytest.mark.parametrize("shape", [(640, 480), (480, 640), (2000, 200), (1, 900), (1, 1), (2, 1)])
def test_training_takes_the_full_image_or_a_box_at_its_own_aspect_ratio(photo, shape, scale):
    image = photo.resize(shape)
    for kind in (image, image.convert("L"), image.convert("P")):
        found = read_crop(save(kind), NAFLEX, np.random.default_rng(5), scale)
        box = (0, 0, *shape)
        if scale is not None:
            box = images.random_box(*shape, np.random.default_rng(5), scale, shape[0] / shape[1])
        size = NAFLEX.fit(box[2] - box[0], box[3] - box[1])
        expected = kind.convert("RGB").crop(box).resize(size, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(found, expected)
        middle = kind.convert("RGB").resize(NAFLEX.fit(*shape), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(read_crop(save(kind), NAFLEX, None, scale), middle)


@pytest.mark.parametrize("scale", [None, (0.1, 0.9)])
@pytest.mark.parametrize("size", [(1600, 1200), (3600, 360), (360, 3600)])
def test_scaled_decoding_leaves_naflex_at_least_the_pixels_it_needs(size, scale):
    """Also of a small box, and of a long image, whose longer side counts."""
    import skimage.data

    photo = Image.fromarray(skimage.data.astronaut())
    data = save(photo.resize(size, Image.Resampling.LANCZOS), "JPEG", quality=92)
    sides, whole = [], Image.Image.resize

    def resize(image, size, resample, box=None):
        left, top, right, bottom = box or (0, 0, *image.size)
        sides.extend([(right - left) / size[0], (bottom - top) / size[1]])
        return whole(image, size, resample, box)

    changed = 0
    for seed in range(8):
        exact = read_crop(data, NAFLEX, np.random.default_rng(seed), scale, scaled=False)
        with mock.patch.object(Image.Image, "resize", autospec=True, side_effect=resize):
            found = read_crop(data, NAFLEX, np.random.default_rng(seed), scale)
        squared = np.mean((found / 255.0 - exact / 255.0) ** 2)
        assert -10 * np.log10(squared + 1e-9) > 36  # PSNR
        changed += (found != exact).any()
    assert changed >= 6  # it did something
    assert min(sides) >= 1
    assert scale or min(sides) < 2  # a smaller image would have been too small


# ------------------------------------------------------------------- images that cannot be used


def fails(data, reason: str) -> str:
    with pytest.raises(ImageError) as error:
        decode(data)
    assert error.value.reason == reason
    assert str(error.value).startswith(f"{reason}: ")
    with pytest.raises(ImageError):
        Preprocess()(data)
    return str(error.value)


def test_what_is_not_an_image(tmp_path):
    fails(b"", "empty")
    message = fails(b"<html>404</html>" * 100, "not an image")
    assert "JPEG" in message
    assert "0x" not in message  # the same text each time: skipped.jsonl is compared
    fails(bytes(5_000), "not an image")
    # Pillow reads EPS by running Ghostscript; we don't read it.
    header = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
    fails(header + bytes(50), "not an image")
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
        Preprocess()(lazy)


def test_what_is_too_large(photo):
    """Pillow's limit before memory is filled, and our own where somebody lifted Pillow's."""
    tall = bytearray(save(photo, "BMP"))
    tall[18:26] = np.array([60_000, 60_000], "<i4").tobytes()
    tracemalloc.start()
    assert "too large" in fails(bytes(tall), "too large")
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
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
        crop = read_crop(save(sliver), Square(224), np.random.default_rng(0))
        assert crop.shape == (224, 224, 3)


def test_the_short_cut_for_slivers_gives_the_same_pixels(photo):
    for image in (photo, photo.rotate(90, expand=True), photo.resize((1000, 64))):
        whole = center_crop(image, 64)
        with mock.patch.object(images, "_MAX_RESIZED_PIXELS", 1):
            part = center_crop(image, 64)
        assert np.abs(whole.astype(int) - part).max() <= 1
        assert np.mean(whole == part) > 0.999


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((24, 24, 3), np.float32), ((3, 24, 24), np.uint8), ((1, 24, 24, 3), np.uint8)],
)
def test_arrays_of_another_kind_name_what_is_needed(shape, dtype):
    with pytest.raises(ImageError, match=r"not an image: array .*uint8 \[H, W, 3\]") as error:
        Preprocess()(np.zeros(shape, dtype))
    assert str(list(shape)) in str(error.value)


def test_arrays_without_pixels_and_with_one_channel(photo):
    with pytest.raises(ImageError, match="empty"):
        Preprocess()(np.zeros((0, 5, 3), np.uint8))
    gray = np.asarray(photo.convert("L"))
    np.testing.assert_array_equal(Preprocess()(gray[:, :, None]), Preprocess()(gray))


def test_the_error_survives_pickling():
    error = pickle.loads(pickle.dumps(ImageError("truncated", "image: 3 bytes left")))
    assert (error.reason, str(error)) == ("truncated", "truncated: image: 3 bytes left")


def test_pillow_warns_of_nothing_once_the_module_is_imported(photo):
    # What Pillow warns about: its size, transparency in a palette, broken EXIF and TIFF entries.
    photo = photo.resize((300, 240))
    palette = save(photo.quantize(8), transparency=bytes(range(8)))
    exif = save(photo, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x20\0" + b"\x12\x01\x03\0\xff" * 3)
    with (
        mock.patch.object(Image, "MAX_IMAGE_PIXELS", photo.width * photo.height - 1),
        warnings.catch_warnings(record=True) as caught,
    ):
        for is_imported in (False, True):
            warnings.simplefilter("always")
            if is_imported:
                runpy.run_path(images.__file__)
            for image in (save(photo), palette, exif):
                caught.clear()
                decode(image)
                Preprocess()(image)
                assert bool(caught) != is_imported


def test_batches_are_read_ahead_in_their_order(monkeypatch):
    """So many and no more, whichever item is ready first."""
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    begun, first = [], threading.Event()

    def batches():
        for start in range(0, 12, 3):
            begun.append(start)
            yield range(start, start + 3)

    def read(item):
        if item == 0:
            assert first.wait(30)
        first.set()
        return 2 * item

    results = read_ahead(batches(), read, ahead=1)
    assert next(results) == [0, 2, 4]
    assert begun == [0, 3]
    assert list(results) == [[6, 8, 10], [12, 14, 16], [18, 20, 22]]


def test_a_complete_image_is_in_the_middle_of_a_white_square():
    tall = Image.new("RGB", (20, 80), "red")
    tall.paste("blue", (0, 0, 20, 20))
    square = complete(tall, 40)
    assert square.shape == (40, 40, 3)
    assert {tuple(square[20, x]) for x in (0, 14, 25, 39)} == {(255, 255, 255)}
    assert tuple(square[2, 20]) == (0, 0, 255)
    assert tuple(square[37, 20]) == (255, 0, 0)
