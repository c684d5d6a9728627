"""Decode JPEGs and resize images with the libraries of the extra `turbo`.

simplejpeg decodes as Pillow does, to the bit; both use libjpeg-turbo. cykooz_resizer computes the
same filter as Pillow with the CPU's vector instructions. Its pixels do not depend on the CPU. They
differ from Pillow's by at most 2 of 255 levels, in less than 1% of a photograph's values, and in
less than 3% of those of any image. Where the height shrinks much more than the width, Pillow 13
begins with the columns, and this module with the rows, as older versions do: then up to a fifth of
the values differ.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from clip_jax.errors import needing

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

_SUPPORT = {Image.Resampling.BICUBIC: 2, Image.Resampling.BILINEAR: 1}  # pixels on each side


class TurboImage:
    """An RGB image with those methods of Pillow's that crops need, and their arguments."""

    def __init__(self, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
        self._pixels = pixels

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._pixels, dtype, copy=copy)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        height, width, _ = self._pixels.shape
        return width, height

    def crop(self, box: Box) -> "TurboImage":
        """Cut a box, whose edges are integers inside the image, without a copy."""
        left, top, right, bottom = map(int, box)
        return TurboImage(self._pixels[top:bottom, left:right])

    def resize(
        self, size: tuple[int, int], resample: Image.Resampling, box: Box | None = None
    ) -> "TurboImage":
        """Resize the image, or a box of it, to width and height."""
        from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, Resizer

        width, height = size
        left, top, right, bottom = box or (0, 0, *self.size)
        # As in Pillow, rows are resized first, and rounded to bytes; then columns.
        support = _SUPPORT[resample] * max(1.0, (bottom - top) / height)
        first = max(0, math.floor(top - support))
        pixels = self._pixels[first : math.ceil(bottom + support)]
        rows = len(pixels)
        source = ImageData(self.size[0], rows, PixelType.U8x3, pixels.tobytes())
        narrow = ImageData(width, rows, PixelType.U8x3)
        result = ImageData(width, height, PixelType.U8x3)
        is_cubic = resample == Image.Resampling.BICUBIC
        algorithm = ResizeAlg.convolution(
            FilterType.catmull_rom if is_cubic else FilterType.bilinear
        )
        resizer = Resizer()
        resizer.resize(source, narrow, _options(algorithm, left, 0, right, rows))
        resizer.resize(narrow, result, _options(algorithm, 0, top - first, width, bottom - first))
        flat = np.frombuffer(result.get_buffer(), np.uint8)
        return TurboImage(flat.reshape(height, width, 3))


def _options(algorithm: Any, left: float, top: float, right: float, bottom: float) -> Any:
    from cykooz_resizer import CropBox, ResizeOptions

    return ResizeOptions(algorithm, crop_box=CropBox(left, top, right - left, bottom - top))


def size_of(data: bytes) -> tuple[int, int] | None:
    """Return width and height of a JPEG in colour or gray; None if the data is anything else."""
    import simplejpeg

    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    return (width, height) if colors in ("YCbCr", "Gray") else None


def decode(data: bytes, full: tuple[int, int], factor: int) -> TurboImage | None:
    """Decode a JPEG of this size at 1 / `factor` of it; None if it is not entirely sound."""
    import simplejpeg

    width, height = (-(-side // factor) for side in full)
    least = {"min_height": height, "min_width": width} if factor > 1 else {}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError:
        return None
    return TurboImage(pixels) if pixels.shape == (height, width, 3) else None


def check_installed() -> None:
    """Raise InputError unless the libraries are installed."""
    with needing(
        "data.decoder=turbo needs an extra: pip install 'clip-jax-pods[turbo]', or set "
        "--data.decoder pillow"
    ):
        import cykooz_resizer
        import simplejpeg

        del cykooz_resizer, simplejpeg
