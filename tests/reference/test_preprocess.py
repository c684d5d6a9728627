"""The same pixels as OpenAI's preprocessing, on photographs and on every odd kind of image."""

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_jax.data.images import Preprocess, center_crop, decode, preprocess


def photographs() -> dict[str, Image.Image]:
    """At full size; scikit-image's folder also has gray, palette and alpha among them."""
    import skimage
    import sklearn.datasets

    folders = [Path(skimage.__file__).parent / "data"]
    folders.append(Path(sklearn.datasets.__file__).parent / "images")
    files = [p for f in folders for p in sorted(f.iterdir()) if p.suffix in (".png", ".jpg")]
    return {p.name: Image.open(p) for p in files}


PHOTOGRAPHS = photographs()
PHOTO = PHOTOGRAPHS["chelsea.png"].convert("RGB")  # 451 x 300


def save(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png(pixels: np.ndarray, color_type: int) -> bytes:
    """A 16-bit PNG of any colour type, which Pillow reads but does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, color_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def odd_images() -> dict[str, bytes]:
    alpha = Image.linear_gradient("L").resize(PHOTO.size)
    rgba = PHOTO.copy()
    rgba.putalpha(alpha)
    gray, palette = PHOTO.convert("L"), PHOTO.quantize(37)
    frames = [PHOTO.rotate(90 * i) for i in range(3)]
    deep = np.asarray(PHOTO, np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    small_gray = Image.fromarray(np.asarray(gray, np.uint16) * 3)
    animation = {"save_all": True, "append_images": frames[1:]}
    return {
        "gray": save(gray, "PNG"),
        "gray jpeg": save(gray, "JPEG"),
        "gray and alpha": save(rgba.convert("LA"), "PNG"),
        "black and white": save(PHOTO.convert("1"), "PNG"),
        "palette": save(palette, "PNG"),
        "palette gif": save(palette, "GIF"),
        "palette, one color transparent": save(palette, "PNG", transparency=3),
        "palette, transparency in bytes": save(palette, "PNG", transparency=bytes(range(37))),
        "alpha webp": save(rgba, "WEBP", lossless=True),
        "rgb, one color transparent": save(PHOTO, "PNG", transparency=PHOTO.getpixel((5, 5))),
        "alpha": save(rgba, "PNG"),
        "cmyk jpeg": save(PHOTO.convert("CMYK"), "JPEG"),
        "cmyk tiff": save(PHOTO.convert("CMYK"), "TIFF"),
        "rgb tiff": save(PHOTO, "TIFF", compression="tiff_lzw"),
        "16-bit gray": save(Image.fromarray(deep[:, :, 1]), "PNG"),
        "16-bit gray, dark": save(small_gray, "PNG"),
        "16-bit gray tiff": save(Image.fromarray(deep[:, :, 1]), "TIFF"),
        "16-bit rgb": png(deep, 2),
        "16-bit rgba": png(np.dstack([deep, np.asarray(alpha, np.uint16) * 257]), 6),
        "16-bit gray and alpha": png(deep[:, :, :2], 4),
        "32-bit integer tiff": save(gray.convert("I"), "TIFF"),
        "float tiff": save(gray.convert("F"), "TIFF"),
        "exif-rotated": save(PHOTO, "JPEG", exif=exif),
        "progressive jpeg": save(PHOTO, "JPEG", progressive=True, subsampling=0),
        "animated gif": save(frames[0], "GIF", **animation),
        "animated webp": save(frames[0], "WEBP", **animation),
        "animated png": save(frames[0], "PNG", **animation),
        "multi-page tiff": save(frames[0], "TIFF", **animation),
        "multi-picture jpeg": save(frames[0], "MPO", **animation),
        "tall": save(PHOTO.resize((40, 900)), "PNG"),
        "one pixel": save(PHOTO.resize((1, 1)), "PNG"),
        "smaller than the input": save(PHOTO.resize((31, 17)), "PNG"),
        "exactly the input": save(PHOTO.resize((224, 224)), "PNG"),
        "a pixel wider than the input": save(PHOTO.resize((225, 224)), "PNG"),
        "bmp": save(PHOTO, "BMP"),
        "jpeg 2000": save(PHOTO, "JPEG2000"),
        "avif": save(PHOTO, "AVIF"),
    }


ODD = odd_images()


def reference(transform, image: Image.Image) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transform(image).numpy().transpose(1, 2, 0)


def assert_same_pixels(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == np.float32
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [224, 97])
def test_photographs(size, openai_clip):
    assert len(PHOTOGRAPHS) > 10
    transform = openai_clip.clip._transform(size)
    for image in PHOTOGRAPHS.values():
        assert_same_pixels(preprocess(image, size), reference(transform, image))


@pytest.mark.parametrize("kind", ODD)
def test_odd_images(kind, tmp_path, openai_clip):
    data = ODD[kind]
    theirs = reference(openai_clip.clip._transform(224), Image.open(io.BytesIO(data)))
    path = tmp_path / "image"
    path.write_bytes(data)
    for given in (data, path, str(path), Image.open(io.BytesIO(data))):
        assert_same_pixels(preprocess(given), theirs)
    with Image.open(path) as image:
        pixels = np.asarray(image)
        # What an array cannot say: its palette, that it is CMYK, that its colour is transparent.
        if (
            image.mode in ("1", "L", "RGB", "RGBA", "I", "I;16")
            and "transparency" not in image.info
        ):
            assert_same_pixels(preprocess(pixels), theirs)


def test_seeked_frame_is_the_one_that_counts(openai_clip):
    image = Image.open(io.BytesIO(ODD["animated gif"]))
    image.seek(2)
    theirs = reference(openai_clip.clip._transform(224), image)
    assert_same_pixels(preprocess(image), theirs)
    assert np.abs(preprocess(ODD["animated gif"]) - theirs).max() > 0.1


def test_training_pixels_are_openais_where_the_image_is_rgb(openai_clip):
    image = PHOTO.rotate(90, expand=True)
    pixels = center_crop(decode(save(image, "PNG")), 224).astype(np.float32) / 255
    theirs = reference(openai_clip.clip._transform(224), image)
    normalised = (pixels - Preprocess().mean) / Preprocess().std
    np.testing.assert_allclose(normalised, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("resize_mode", "interpolation", "fill"),
    [
        ("shortest", "bilinear", 0),
        ("squash", "bicubic", 0),
        ("longest", "bilinear", 0),
        ("longest", "bicubic", 200),  # bars of another colour
    ],
)
def test_open_clips_resize_modes(resize_mode, interpolation, fill, open_clip):
    half = (0.5, 0.5, 0.5)
    options = {"mean": half, "std": half, "interpolation": interpolation}
    options |= {"resize_mode": resize_mode}
    transform = open_clip.image_transform(160, is_train=False, fill_color=fill, **options)
    ours = Preprocess(image_size=160, fill=fill, **options)
    shapes = [(451, 300), (300, 451), (160, 160), (33, 60), (333, 331), (801, 160)]
    images = [PHOTO.resize(shape) for shape in shapes]
    images += [Image.open(io.BytesIO(ODD[k])) for k in ("palette", "alpha", "gray", "cmyk jpeg")]
    for image in images:
        assert_same_pixels(ours(image), reference(transform, image))
