"""Photographs, and odd images of every kind that can be met."""

import io
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

FOLDER = Path(skimage.__file__).parent / "data"
PHOTO = Image.open(FOLDER / "chelsea.png").convert("RGB")  # 451 x 300


def save(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def odd_images() -> dict[str, bytes]:
    alpha = Image.linear_gradient("L").resize(PHOTO.size)
    rgba = PHOTO.copy()
    rgba.putalpha(alpha)
    gray, palette = PHOTO.convert("L"), PHOTO.quantize(37)
    frames = [PHOTO.rotate(90 * i) for i in range(3)]
    deep = np.asarray(gray, np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    animation = {"save_all": True, "append_images": frames[1:]}
    return {
        "gray": save(gray, "PNG"),
        "gray and alpha": save(rgba.convert("LA"), "PNG"),
        "black and white": save(PHOTO.convert("1"), "PNG"),
        "palette": save(palette, "PNG"),
        "palette, one color transparent": save(palette, "PNG", transparency=3),
        "palette, transparency in bytes": save(palette, "PNG", transparency=bytes(range(37))),
        "alpha webp": save(rgba, "WEBP", lossless=True),
        "rgb, one color transparent": save(PHOTO, "PNG", transparency=PHOTO.getpixel((5, 5))),
        "alpha": save(rgba, "PNG"),
        "cmyk jpeg": save(PHOTO.convert("CMYK"), "JPEG"),
        "16-bit gray": save(Image.fromarray(deep * 257), "PNG"),
        "16-bit gray, dark": save(Image.fromarray(deep * 3), "PNG"),
        "32-bit integer tiff": save(gray.convert("I"), "TIFF"),
        "float tiff": save(gray.convert("F"), "TIFF"),
        "exif-rotated": save(PHOTO, "JPEG", exif=exif),
        "animated gif": save(frames[0], "GIF", **animation),
        "multi-page tiff": save(frames[0], "TIFF", **animation),
        "tall": save(PHOTO.resize((40, 900)), "PNG"),
        "one pixel": save(PHOTO.resize((1, 1)), "PNG"),
        "smaller than the input": save(PHOTO.resize((31, 17)), "PNG"),
        "exactly the input": save(PHOTO.resize((224, 224)), "PNG"),
        "a pixel wider than the input": save(PHOTO.resize((225, 224)), "PNG"),
    }


ODD = odd_images()


def kinds() -> list[Image.Image]:
    """All kinds of odd images, and photographs of several shapes."""
    shapes = [(451, 300), (300, 451), (160, 160), (33, 60), (333, 331), (801, 160)]
    images = [Image.open(io.BytesIO(data)) for data in ODD.values()]
    return [*(PHOTO.resize(shape) for shape in shapes), *images]
