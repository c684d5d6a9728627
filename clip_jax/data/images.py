"""Decode, crop and resize images (paper, 2.4: a random square crop is the only augmentation).

There are two orders, both on purpose. `Preprocess`, for finished weights, reproduces OpenAI's
preprocessing to the pixel: resize and crop in the image's own mode, then convert to RGB. Training
converts to RGB first (`decode`), so that crops are cheap and all modes are treated alike. The two
agree on RGB images. Both ignore EXIF orientation, drop alpha, clip 16-bit gray at 255 and use the
first frame of an animation, as OpenAI's and open_clip's code does.
"""

import contextlib
import functools
import io
import math
import os
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image, ImageOps

from clip_jax.data import turbo
from clip_jax.data.turbo import Box, TurboImage
from clip_jax.errors import InputError
from clip_jax.models.images import (
    OPENAI_MEAN,
    OPENAI_STD,
    Images,
    ImageSpec,
    NaFlex,
    Square,
    normalize,
    pixels_of,
)
from clip_jax.models.layers import check_sizes
from clip_jax.storage import files

Channels = tuple[float, float, float]
Interpolation = Literal["bicubic", "bilinear"]
ResizeMode = Literal["shortest", "squash", "longest", "naflex"]
Rules = Literal["openai", "transformers", "torchvision", "tensorflow"]
Reason = Literal["unreadable", "empty", "not an image", "truncated", "corrupt", "too large"]
Item = TypeVar("Item")
Result = TypeVar("Result")
Decoder = Literal["pillow", "turbo"]
ImageLike = Image.Image | np.ndarray | bytes | str | os.PathLike


@runtime_checkable
class _Resizable(Protocol):
    """What Pillow's images and those of `turbo` have in common. Methods return their own type."""

    def crop(self, box: Box) -> Any: ...

    def resize(
        self, size: tuple[int, int], resample: Image.Resampling, box: Box | None = None
    ) -> Any: ...


AnyImage = TypeVar("AnyImage", bound=_Resizable)

# Warnings about metadata, palettes and sizes, which nobody can act on during a run.
warnings.filterwarnings("ignore", module=r"PIL\.")

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

MAX_PIXELS = 178_956_970  # above this Pillow itself reports a decompression bomb

_FLATTEST = 4 / 3  # largest aspect ratio of random crops with a scale, as in torchvision

_MAX_RESIZED_PIXELS = 1 << 24  # intermediate image; at 224 pixels, one 334 times as long as wide

# The formats that are read. Not all that Pillow supports: its EPS reader, for one, would run
# Ghostscript on downloaded files.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "AVIF", "BMP", "TIFF"),
    *("JPEG2000", "PPM", "TGA", "ICO", "PCX", "DDS", "QOI"),
)
SUFFIXES = (  # of files that count as images, in folders and in tars
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff"),
    *(".jp2", ".ppm", ".pgm"),
)


class ImageError(InputError):
    """An image that cannot be used; `reason` says why in a word or two."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.reason, str(self).removeprefix(f"{self.reason}: "))


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """Preprocessing of images for finished weights; the defaults are OpenAI's."""

    image_size: int = 224  # Height and width of the model's input, in pixels.
    mean: Channels = OPENAI_MEAN  # Mean of each channel, for pixels in [0, 1]; it is subtracted.
    std: Channels = OPENAI_STD  # Standard deviation of each channel, by which pixels are divided.
    interpolation: Interpolation = "bicubic"  # Resampling filter for resizing.
    # "shortest": shorter side to image_size, then a centre crop (OpenAI). "squash": both sides to
    # image_size. "longest": longer side to image_size, padded to a square (both from open_clip).
    # "naflex": the aspect ratio is kept, with at most max_patches patches of patch_size.
    resize_mode: ResizeMode = "shortest"
    # Side of the crop divided by the shorter side of the resized image; not with longest or naflex.
    # DINOv2's processors have 0.875: 224 pixels of 256.
    crop_ratio: float = 1.0
    max_patches: int | None = None  # Maximum number of patches with resize_mode=naflex.
    patch_size: int | None = None  # Height and width of a patch with resize_mode=naflex, in pixels.
    fill: int = 0  # Value of the padding in every channel, from 0 (black) to 255 (white).
    # "openai": resize and crop in the image's own mode, then convert to RGB and drop alpha; halves
    # of odd margins are rounded to even. The others convert to RGB first, and round them down.
    # "transformers", "torchvision": alpha over white; torchvision's own pixels differ by up to 2.
    # "tensorflow": alpha is dropped; pixels are rounded once, after both directions of resizing.
    rules: Rules = "openai"

    def __post_init__(self) -> None:
        ranges = {"mean": "(-inf, inf)", "std": "(0, inf)", "fill": "[0, 255]"}
        check_sizes(self, "", **ranges, crop_ratio="[0.1, 1]")
        choices = {"interpolation": Interpolation, "resize_mode": ResizeMode, "rules": Rules}
        for name, choice in choices.items():
            value = getattr(self, name)
            if value not in get_args(choice):
                raise InputError(f"{name}={value!r} must be one of {', '.join(get_args(choice))}")
        if self.crop_ratio != 1 and self.resize_mode not in ("shortest", "squash"):
            raise InputError(
                f"crop_ratio={self.crop_ratio} needs resize_mode='shortest' or 'squash', got "
                f"{self.resize_mode!r}; set it to 1."
            )
        if (self.resize_mode == "naflex") != bool(self.max_patches and self.patch_size):
            raise InputError(
                f"resize_mode={self.resize_mode!r} with max_patches={self.max_patches} and "
                f"patch_size={self.patch_size}: set both with 'naflex', and none without."
            )

    def __call__(self, image: ImageLike) -> Float32[np.ndarray, "H W 3"]:
        """Return the normalised pixels of a PIL image, an array ([H, W], [H, W, 1 | 3 | 4],
        integers), or an encoded image's bytes or path; see `batch` for patches. Raises
        ImageError."""
        return pixels_of(self.normalize(self.pixels(image)[None]))[0]

    @property
    def image_spec(self) -> ImageSpec:
        """The shape of the images that `batch` returns."""
        if self.max_patches and self.patch_size:
            return NaFlex(self.max_patches, self.patch_size)
        return Square(self.image_size)

    @property
    def shorter_side(self) -> int:
        """The shorter side of an image after resizing and before the crop, in pixels."""
        return round(self.image_size / self.crop_ratio)

    def batch(self, image: ImageLike) -> Images:
        """Return a batch of one image as bytes, for a device to normalise. Raises ImageError."""
        return self.image_spec.pack(self.pixels(image)[None])

    def normalize(self, images: Images) -> Images:
        """Scale bytes to [0, 1], subtract the mean and divide by the standard deviation."""
        return normalize(images, self.mean, self.std)

    def pixels(self, image: ImageLike) -> UInt8[np.ndarray, "H W 3"]:
        """Return the pixels before normalisation, in a quarter of the bytes. Raises ImageError."""
        with opened(image) as source:
            if self.rules in ("transformers", "torchvision"):
                source = _over_white(source)
            elif self.rules == "tensorflow" or self.resize_mode == "naflex":
                source = source.convert("RGB")
            if self.rules != "tensorflow":
                return np.asarray(self._resize(source).convert("RGB"))
            bands = [np.asarray(self._resize(band.convert("F"))) for band in source.split()]
            return np.rint(np.stack(bands, -1).clip(0, 255)).astype(np.uint8)

    def _resize(self, image: Image.Image) -> Image.Image:
        size, resample = self.image_size, RESAMPLING[self.interpolation]
        if self.resize_mode == "naflex":
            return image.resize(self.image_spec.fit(*image.size), resample)
        if self.resize_mode in ("squash", "shortest"):
            square = _square(
                image.size,
                size,
                down=self.rules != "openai",
                shorter=self.shorter_side,
                squash=self.resize_mode == "squash",
            )
            return _crop_of_resized(image, square, resample)
        longer = max(image.size)
        width, height = (max(1, round(side * size / longer)) for side in image.size)
        resized = image.resize((width, height), resample)
        left, top = (size - width) // 2, (size - height) // 2
        border = (left, top, size - width - left, size - height - top)
        bands = len(resized.getbands())
        return ImageOps.expand(resized, border, (self.fill,) * bands if bands > 1 else self.fill)


def read_ahead(
    batches: Iterable[Sequence[Item]], read: Callable[[Item], Result], ahead: int = 2
) -> Iterator[list[Result]]:
    """Read the items of each batch in threads, `ahead` batches before they are needed."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        waiting: deque[list[Future[Result]]] = deque()
        for batch in batches:
            waiting.append([threads.submit(read, item) for item in batch])
            if len(waiting) > ahead:
                yield [future.result() for future in waiting.popleft()]
        for futures in waiting:
            yield [future.result() for future in futures]


def decode(image: ImageLike) -> Image.Image:
    """Convert an image, encoded (bytes or path) or not, to RGB. Raises ImageError."""
    with opened(image) as source:
        return _rgb(source)


def _rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB, without a copy of what is RGB."""
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def size_of(data: bytes) -> tuple[int, int]:
    """Return an encoded image's width and height without decoding it. Raises ImageError."""
    with opened(data, load=False) as image:
        return image.size


def read_crops(
    data: bytes,
    specs: Sequence[ImageSpec],
    rng: np.random.Generator | None = None,
    scale: tuple[float, float] | None = None,
    *,
    scaled: bool = True,
    decoder: Decoder = "pillow",
) -> list[UInt8[np.ndarray, "_H _W 3"]]:
    """Decode an image and crop it, at random with `rng`, else in the middle. Raises ImageError.

    Square inputs as in the paper: the shorter side is resized, then a square is cropped at a random
    position. Any other input takes the full image. With `scale`, as in open_clip, whose default is
    (0.9, 1.0): a rectangle with that share of the area and an aspect ratio between 3:4 and 4:3 is
    squeezed to the input's size. (At (0.9, 1.0) no such rectangle fits into a 3:2 photograph;
    open_clip then always takes the middle 4:3.) For NaFlex, its aspect ratio is between 3:4 and 4:3
    times the image's. The first input decides; the others get the same box, resized from the image.

    With `scaled`, a JPEG is decoded at 1/2, 1/4 or 1/8 size where the crop still has at least as
    many pixels a side as the input; the choice of the crop does not depend on it. The decoder
    `turbo` needs the extra `turbo` (see `clip_jax.data.turbo`).
    """

    def wanted(spec: ImageSpec, full: tuple[int, int]) -> int:
        return _reduction(full, spec, None if rng is None else scale) if scaled else 1

    box: Box = (0, 0, 0, 0)
    crops: list[UInt8[np.ndarray, "_H _W 3"]] = []
    known: dict[int, Image.Image | TurboImage] = {}
    for spec in specs:
        image, full, factor = _decoded(data, functools.partial(wanted, spec), decoder, known)
        if not crops and rng is not None and scale is not None:
            aspect = 1.0 if isinstance(spec, Square) else full[0] / full[1]
            box = random_box(*full, rng, scale, aspect)
        elif not crops and isinstance(spec, Square):
            square = _square(full, spec.side, rng)
            box = square.box
            crop = _crop_of_resized(image, square, Image.Resampling.BICUBIC, factor)
            crops.append(np.array(crop))
            continue
        elif not crops:
            box = (0, 0, *full)
        crops.append(_resized_box(image, spec, box, factor))
    return crops


class View(NamedTuple):
    """A random crop of an image: its size, its share of the image's area, and its generator."""

    spec: ImageSpec
    area: tuple[float, float]  # smallest and largest share; (1, 1): the image as it is
    rng: np.random.Generator


def read_views(
    image: ImageLike,
    views: Sequence[View],
    *,
    scaled: bool = True,
    decoder: Decoder = "pillow",
) -> list[UInt8[np.ndarray, "_H _W 3"]]:
    """Decode an image once and crop it for each view, as `read_crops` with `scale` does.

    With `scaled`, a JPEG is decoded at the size that the most detailed view needs. Raises
    ImageError.
    """
    complete = [view.area == (1, 1) for view in views]

    def wanted(full: tuple[int, int]) -> int:
        factors = [
            _reduction(full, view.spec, None if is_complete else view.area)
            for view, is_complete in zip(views, complete, strict=True)
        ]
        return min(factors) if scaled else 1

    decoded, full, factor = _decoded(image, wanted, decoder, {})
    crops = []
    for view, is_complete in zip(views, complete, strict=True):
        box: Box = (0, 0, *full)
        if not is_complete:
            aspect = 1.0 if isinstance(view.spec, Square) else full[0] / full[1]
            box = random_box(*full, view.rng, view.area, aspect)
        crops.append(_resized_box(decoded, view.spec, box, factor))
    return crops


class _Decoded(NamedTuple):
    """An RGB image at 1 / `factor` of its full size."""

    image: Image.Image | TurboImage
    full: tuple[int, int]
    factor: int


def _decoded(
    source: ImageLike,
    factor_of: Callable[[tuple[int, int]], int],
    decoder: Decoder,
    known: dict[int, Image.Image | TurboImage],
) -> _Decoded:
    """Decode an image, a JPEG at 1 / `factor_of(size)` of its size, unless it is `known` by its
    factor; add it there. Raises ImageError.

    What turbo cannot decode, such as other formats or damaged files, Pillow does or refuses.
    """
    if decoder == "turbo" and isinstance(source, bytes):
        full = turbo.size_of(source)
        if full is not None and math.prod(full) <= MAX_PIXELS:
            factor = factor_of(full)
            image = known.get(factor) or turbo.decode(source, full, factor)
            if image is not None:
                return _Decoded(known.setdefault(factor, image), full, factor)
    with opened(source, load=False) as opened_image:
        full = opened_image.size
        factor = _reduce(opened_image, factor_of(full))
        if factor not in known:
            rgb = _rgb(opened_image)
            known[factor] = TurboImage(np.asarray(rgb)) if decoder == "turbo" else rgb
    return _Decoded(known[factor], full, factor)


def _reduction(full: tuple[int, int], spec: ImageSpec, scale: tuple[float, float] | None) -> int:
    """Return by what factor, at most 8, a decoded image may be smaller if crops of it suffice."""
    spare = min(side / fit for side, fit in zip(full, spec.fit(*full), strict=True))
    if scale is not None:  # of the smallest box
        smallest = math.sqrt(full[0] * full[1] * scale[0] / _FLATTEST)
        spare = min(*full, smallest) / spec.side
    return next((f for f in (8, 4, 2) if spare >= f), 1)


def _reduce(image: Image.Image, factor: int) -> int:
    """Let a JPEG be decoded at 1 / `factor` of its size; return the factor of any image."""
    full = image.size
    if factor > 1:
        image.draft(None, (full[0] // factor, full[1] // factor))  # only JPEG's does anything
    # Sizes are rounded up: the last column of an odd image is half empty.
    reduced = (tuple(-(-side // f) for side in full) == image.size for f in (1, 2, 4, 8))
    return 2 ** list(reduced).index(True)


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Resize the shorter side of an RGB image to `size` (bicubic) and crop the middle square."""
    square = _square(image.size, size)
    return np.array(_crop_of_resized(image, square, Image.Resampling.BICUBIC))


def complete(image: Image.Image, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """Fit a complete RGB image of any aspect ratio into a white square."""
    return np.array(ImageOps.pad(image, (size, size), color="white"))


def fitted(pixels: UInt8[np.ndarray, "H W C"], spec: ImageSpec) -> UInt8[np.ndarray, "h w C"]:
    """Resize an image that was drawn for another input, unless it fits (bicubic)."""
    height, width = pixels.shape[:2]
    size = spec.fit(width, height)
    if size == (width, height):
        return pixels
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def _resized_box(
    image: Image.Image | TurboImage, spec: ImageSpec, box: Box, factor: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Resize a box of the full image, of which `image` is 1 / `factor`, to the input's size."""
    left, top, right, bottom = box
    size = spec.fit(round(right - left), round(bottom - top))
    if factor == 1 and all(isinstance(edge, int) for edge in box):
        return np.array(image.crop(box).resize(size, Image.Resampling.BICUBIC))
    reduced = (left / factor, top / factor, right / factor, bottom / factor)
    return np.array(image.resize(size, Image.Resampling.BICUBIC, box=reduced))


class _Square(NamedTuple):
    """A square of a resized image."""

    full: tuple[int, int]  # width and height of the image before
    resized: tuple[int, int]  # width and height of the resized image
    side: int  # of the square, in pixels of the resized image
    corner: tuple[int, int]  # left and top, in the resized image

    @property
    def box(self) -> Box:
        """The square in the full image."""
        sizes = list(zip(self.corner, self.full, self.resized, strict=True))
        left, top = (start * full / size for start, full, size in sizes)
        right, bottom = ((start + self.side) * full / size for start, full, size in sizes)
        return (left, top, right, bottom)


def _square(
    full: tuple[int, int],
    side: int,
    rng: np.random.Generator | None = None,
    down: bool = False,
    shorter: int | None = None,
    squash: bool = False,
) -> _Square:
    """Choose a square at random with `rng`, else the middle, whose offset `down` rounds down.

    The shorter side of the image, with `squash` both, is resized to `shorter`, by default the side
    of the square.
    """
    shorter = side if shorter is None else shorter
    width, height = (shorter if squash else shorter * edge // min(full) for edge in full)

    def middle(spare: int) -> int:
        # round: halves go to the even number, as in torchvision's CenterCrop
        return spare // 2 if down else round(spare / 2)

    corner = (middle(width - side), middle(height - side))
    if rng is not None:
        offset = int(rng.integers(max(width, height) - side + 1))
        corner = (offset, 0) if width > height else (0, offset)
    return _Square(full, (width, height), side, corner)


def _crop_of_resized(
    image: AnyImage, square: _Square, resample: Image.Resampling, factor: int = 1
) -> AnyImage:
    """Resize an image and crop the square; `image` is 1 / `factor` of the full one."""
    side = square.side
    if factor > 1 or math.prod(square.resized) > _MAX_RESIZED_PIXELS:
        # In a reduced image the crop's border lies between pixels, and a sliver, once resized,
        # would fill the memory. Resizing only the cropped part gives the same pixels, up to the
        # rounding of its border to float32.
        left, top, right, bottom = square.box
        box = (left / factor, top / factor, right / factor, bottom / factor)
        return image.resize((side, side), resample, box=box)
    left, top = square.corner
    resized = image.resize(square.resized, resample)
    return resized.crop((left, top, left + side, top + side))


def random_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float],
    aspect: float = 1.0,
) -> tuple[int, int, int, int]:
    """Draw a box (left, top, right, bottom) as torchvision's RandomResizedCrop does: ten attempts
    to fit a rectangle into the image, else the largest one in the middle with an aspect ratio of
    at most 4:3, both relative to `aspect`."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = aspect * math.exp(rng.uniform(-math.log(_FLATTEST), math.log(_FLATTEST)))
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w + 1))
            top = int(rng.integers(height - h + 1))
            return (left, top, left + w, top + h)
    w = min(width, round(height * _FLATTEST * aspect))
    h = min(height, round(width * _FLATTEST / aspect))
    left = (width - w) // 2
    top = (height - h) // 2
    return (left, top, left + w, top + h)


def _over_white(image: Image.Image) -> Image.Image:
    """Convert to RGB as transformers does: transparent pixels become white."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@contextlib.contextmanager
def opened(source: ImageLike, load: bool = True) -> Generator[Image.Image]:
    """Open an image for the block; any error in it becomes an ImageError."""
    with contextlib.ExitStack() as stack:
        try:
            image = _open(source, stack)
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(
                    "too large", f"{image.width} x {image.height} pixels; limit {MAX_PIXELS:,}"
                )
            if not image.width * image.height:
                raise ImageError("empty", f"{image.width} x {image.height} pixels")
            if load:
                image.load()
            yield image
        except ImageError:
            raise
        except Image.UnidentifiedImageError as error:
            raise ImageError("not an image", f"none of {', '.join(_formats())}") from error
        except Exception as error:  # Pillow raises almost anything on damaged bytes
            raise ImageError(_reason(error), f"{error or type(error).__name__}") from error


def _open(source: ImageLike, stack: contextlib.ExitStack) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        if not source:
            raise ImageError("empty", "0 bytes")
        file = io.BytesIO(source)
    else:
        if os.path.exists(source) and not os.path.isfile(source):  # a pipe would never end
            raise ImageError("unreadable", f"a folder, a pipe or a device: {source}")
        try:
            file = stack.enter_context(files.open_file(source))
        except OSError as error:
            raise ImageError("unreadable", f"{error.strerror or error}: {source}") from error
    return Image.open(file, formats=_formats())


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[:, :, 0]
    gray = array.ndim == 2 and array.dtype in (np.bool_, np.uint8, np.uint16, np.int32)
    color = array.ndim == 3 and array.shape[-1] in (3, 4) and array.dtype == np.uint8
    if not (gray or color):
        raise ImageError(
            "not an image",
            f"array of {array.dtype}{list(array.shape)}; pass uint8 [H, W, 3] with values 0 to 255 "
            "(or [H, W], [H, W, 4]; 16-bit gray as uint16 [H, W])",
        )
    if not array.size:
        raise ImageError("empty", f"array of shape {list(array.shape)}")
    return Image.fromarray(array)


def _reason(error: Exception) -> Reason:
    if isinstance(error, (Image.DecompressionBombError, MemoryError)):
        return "too large"
    if isinstance(error, EOFError) or "truncated" in str(error).lower():
        return "truncated"
    return "corrupt"


@functools.cache
def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this build of Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)
