"""The bundled digits data set: images of handwritten numbers with captions, without a download.

Numbers of k digits are composed of the 1,797 scans in digits.csv.gz (8x8 pixels, 17 levels; the
test part of UCI's "Optical Recognition of Handwritten Digits"), with captions in varied wording.
Some numbers are left out of training and three writers' pages are held out, so that zero-shot
accuracy is measured on unseen handwriting, for seen and for unseen numbers.

A number always has k digits, and its leading zeros are spelled out: with k = 2 the number 7 is
written 0 7, its numeral is "07" and its words are "zero seven"; 0 is "zero zero".
"""

import functools
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int, UInt8

from clip_jax.data.sources import SourceConfig
from clip_jax.errors import InputError, check_ranges

_MAX_DIGITS = 6
_UNSEEN_SHARE = 0.2

# The scans are 14 pages of about 128, each by one writer (a page begins with 0 to 9 three times).
# Every fifth page, from the first on, is held out. Writers differ: a support vector machine
# recognises 95 to 99% of the scans that such a choice holds out, and 97% of these.
_HELD_OUT_PAGES = ((0, 130), (646, 776), (1287, 1415))

_SCAN_SIZE = 8
_ZOOM = 4  # scans are stored enlarged, so that bilinear sampling neither blurs nor aliases
_MARGIN = 1  # empty scan pixels around a glyph
_GLYPH_SIZE = (_SCAN_SIZE + 2 * _MARGIN) * _ZOOM
_ELASTIC_GRID = 3  # control points along each side of a glyph

_EVALUATION_KEY = 0x5CA1AB1E

# fmt: off
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on

# 42: words "forty-two", spelled "four two", spaced "4 2", numeral "42".
TEMPLATES = (
    "{words}",
    "{spelled}",
    "{numeral}",
    "a photo of the number {words}",
    "a photo of the number {numeral}",
    "a photo of the digits {spelled}",
    "the digits {spaced} in handwriting",
    "the digits {spelled}, written by hand",
    "the number {words} on paper",
    "a handwritten {numeral}",
    "a handwritten {words}",
    "somebody wrote {words}",
    "it reads {spelled}",
)


@dataclass(frozen=True, kw_only=True)
class Jitter:
    """Random variation between renderings of the same scans; all zeros leave them unchanged.

    Rotation to fade vary each digit separately, the others the image.
    """

    rotation: float = 12.0  # Largest rotation of a digit in either direction, in degrees.
    scale: float = 0.12  # Largest change of a digit's size, as a fraction.
    stretch: float = 0.12  # Largest change of a digit's width against its height, as a fraction.
    shear: float = 0.2  # Largest slant of a digit, as the tangent of the angle.
    shift: float = 0.1  # Largest displacement of a digit in x and y, as a fraction of its size.
    elastic: float = 0.3  # Standard deviation of elastic deformations, in pixels of the 8x8 scan.
    thickness: float = 0.8  # Change of stroke width; 1: up to 1/4 scan pixel on each side.
    fade: float = 0.3  # Largest loss of ink, as a fraction.
    drift: float = 0.25  # Largest vertical displacement of a number, as a fraction of free space.
    shade: float = 0.3  # Largest darkening of the paper, as a fraction of white.
    tint: float = 0.1  # Largest difference between the paper's colour channels, as a fraction.
    noise: float = 0.04  # Standard deviation of the pixel noise, as a fraction of white.

    def __post_init__(self) -> None:
        shares = ("scale", "stretch", "shift", "fade", "drift", "shade", "tint", "noise")
        check_ranges(
            self,
            "jitter.",
            **dict.fromkeys(shares, "[0, 1)"),
            rotation="[0, 360]",
            shear="[0, inf)",
            elastic="[0, inf)",
            thickness="[0, 1]",
        )


# Fixed, so that scores stay comparable whatever jitter a run trains with.
HELD_OUT_JITTER = Jitter(
    rotation=4.0,
    scale=0.05,
    stretch=0.04,
    shear=0.0,
    shift=0.03,
    elastic=0.0,
    thickness=0.0,
    fade=0.1,
    drift=0.1,
    shade=0.1,
    tint=0.03,
    noise=0.02,
)


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(SourceConfig):
    """The bundled digits data set: handwritten numbers of `digits` digits each."""

    digits: int = 2  # Number of digits of each number, from 1 to 6.
    # "train": seen numbers by training writers. "test": all numbers by held-out writers.
    split: Literal["train", "test"] = "train"
    samples: int = 50_000  # Number of pairs in one epoch.
    split_seed: int = 0  # Random seed that chooses the numbers left out of training.
    jitter: Jitter = Jitter()  # Random variation of training images; test images have less.

    def __post_init__(self) -> None:
        _check_digits(self.digits)
        check_ranges(self, "source.", samples="[1, inf)", split_seed="[0, inf)")

    def open(self, image_size: int, _: tuple[int, int]) -> "DigitsSource":
        return DigitsSource(self, image_size)


def _check_digits(digits: int) -> None:
    if not 1 <= digits <= _MAX_DIGITS:
        raise InputError(f"digits={digits} must be at least 1 and at most {_MAX_DIGITS}")


def number_split(digits: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split the numbers of `digits` digits into those seen in training and the unseen fifth.

    Every digit occurs at every position of seen numbers. With one digit all numbers are seen.
    """
    _check_digits(digits)
    count = 10**digits
    if digits == 1:
        return list(range(count)), []
    rng = np.random.default_rng([seed, digits])
    while True:
        order = rng.permutation(count)
        unseen, seen = np.split(order, [int(_UNSEEN_SHARE * count)])
        places = [np.unique(seen // 10**power % 10) for power in range(digits)]
        if all(len(values) == 10 for values in places):
            return sorted(seen.tolist()), sorted(unseen.tolist())


def scan_split() -> tuple[Int[np.ndarray, " train"], Int[np.ndarray, " held_out"]]:
    """Return the indices of the scans on the 11 training pages and on the 3 held-out pages."""
    held_out = np.concatenate([np.arange(*page) for page in _HELD_OUT_PAGES])
    return np.setdiff1d(np.arange(len(_scans()[1])), held_out), held_out


def number_words(number: int, digits: int) -> str:
    """Spell a number: 42 is "forty-two", and with two digits 7 is "zero seven"."""
    numeral = f"{number:0{digits}d}"
    zeros = len(numeral) - len(numeral.lstrip("0"))
    return " ".join(["zero"] * zeros + ([_cardinal(number)] if number else []))


def _cardinal(number: int) -> str:
    """Spell a number from 1 to 999,999 without "and": "four thousand two hundred seventeen"."""
    words = []
    if number >= 1000:
        words += [_cardinal(number // 1000), "thousand"]
        number %= 1000
    if number >= 100:
        words += [_ONES[number // 100], "hundred"]
        number %= 100
    if number >= 20:
        tens, ones = divmod(number, 10)
        words.append(f"{_TENS[tens]}-{_ONES[ones]}" if ones else _TENS[tens])
    elif number:
        words.append(_ONES[number])
    return " ".join(words)


def prompts(number: int, digits: int) -> list[str]:
    """Return all captions of a number; no two numbers share a caption."""
    numeral = f"{number:0{digits}d}"
    fields = {
        "words": number_words(number, digits),
        "spelled": " ".join(_ONES[int(digit)] for digit in numeral),
        "spaced": " ".join(numeral),
        "numeral": numeral,
    }
    return list(dict.fromkeys(template.format(**fields) for template in TEMPLATES))


@functools.cache
def _scans() -> tuple[Float32[np.ndarray, "1797 8 8"], Int[np.ndarray, "1797"]]:
    """Return each scan's ink, from 0 to 1, and its digit."""
    packed = (resources.files("clip_jax.data") / "digits.csv.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    rows = np.loadtxt(lines, np.uint8, delimiter=",")
    return (rows[:, :-1] / np.float32(16)).reshape(-1, 8, 8), rows[:, -1].astype(int)


@functools.cache
def _glyphs() -> UInt8[np.ndarray, "3 1797 40 40"]:
    """Return all scans enlarged, with a margin: thinned, unchanged and thickened."""
    from scipy import ndimage

    scans, _ = _scans()
    padded = np.pad(scans, ((0, 0), (_MARGIN, _MARGIN), (_MARGIN, _MARGIN)))
    plain = ndimage.zoom(padded, (1, _ZOOM, _ZOOM), order=3, grid_mode=True, mode="nearest")
    plain = np.clip(plain, 0, 1)
    thin = ndimage.grey_erosion(plain, size=(1, 3, 3))
    thick = ndimage.grey_dilation(plain, size=(1, 3, 3))
    return np.rint(255 * np.stack([thin, plain, thick])).astype(np.uint8)


@functools.cache
def _places(
    digits: int, image_size: int
) -> tuple[Float32[np.ndarray, "k P 2"], Float32[np.ndarray, "k P 9"]]:
    """For each digit, return every image pixel as (x, y) relative to the digit's centre, in digit
    sizes, and the weights of the control points of the elastic deformation there."""
    pixels = (np.arange(image_size) + 0.5) / image_size * digits
    y, x = np.meshgrid(pixels - digits / 2, pixels, indexing="ij")
    middles = np.arange(digits) + 0.5
    points = np.stack(
        [x.ravel() - middles[:, None], np.broadcast_to(y.ravel(), (digits, y.size))], -1
    )
    knots = np.linspace(-0.5, 0.5, _ELASTIC_GRID)
    step = knots[1] - knots[0]
    hats = np.maximum(0, 1 - np.abs(np.clip(points, -0.5, 0.5)[..., None] - knots) / step)
    weights = np.einsum("kpi,kpj->kpji", hats[:, :, 0], hats[:, :, 1])
    return points.astype(np.float32), weights.reshape(*points.shape[:2], -1).astype(np.float32)


def render(
    scans: Int[np.ndarray, " k"],
    rng: np.random.Generator,
    image_size: int,
    jitter: Jitter,
) -> UInt8[np.ndarray, "image_size image_size 3"]:
    """Draw these scans side by side, from left to right, in dark ink on light paper.

    The digits share the width of the image equally and are centred vertically.
    """
    k = len(scans)
    points, weights = _places(k, image_size)

    def spread(limit: float, *shape: int) -> Float32[np.ndarray, "..."]:
        return rng.uniform(-limit, limit, shape).astype(np.float32)

    # From the image to the glyph: p -> A(p - c) + bend.
    angle, shear = np.deg2rad(spread(jitter.rotation, k)), spread(jitter.shear, k)
    size, stretch = 1 + spread(jitter.scale, k), 1 + spread(jitter.stretch, k)
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.stack([np.stack([cos, sin], -1), np.stack([-sin, cos], -1)], -2)
    slant = np.zeros_like(turn)
    slant[:, 0, 0], slant[:, 0, 1], slant[:, 1, 1] = 1 / stretch, shear, stretch
    matrix = np.einsum("kij,kjl->kil", slant, turn) / size[:, None, None]
    centre = spread(jitter.shift, k, 2)
    centre[:, 1] += spread(jitter.drift) * (k - 1) / 2
    bend = rng.standard_normal((k, weights.shape[-1], 2), np.float32) * jitter.elastic / _SCAN_SIZE
    where = (points - centre[:, None]) @ matrix.swapaxes(1, 2) + weights @ bend

    # Thickness mixes the glyph with its thinner or its thicker self.
    glyphs = _glyphs()
    thickness = spread(jitter.thickness, k)
    other = np.where(thickness < 0, 0, 2)
    plain, amount = glyphs[1, scans].astype(np.float32), np.abs(thickness)[:, None, None]
    inked = plain + (glyphs[other, scans] - plain) * amount
    ink = _bilinear(inked, where) / 255
    ink = (ink * (1 - rng.uniform(0, jitter.fade, (k, 1)))).max(0).astype(np.float32)

    paper = 1 - rng.uniform(0, jitter.shade) - rng.uniform(0, jitter.tint, 3).astype(np.float32)
    pixels = paper * (1 - 0.9 * ink[:, None])
    pixels += jitter.noise * rng.standard_normal((len(pixels), 1), np.float32)
    return np.rint(255 * np.clip(pixels, 0, 1)).astype(np.uint8).reshape(image_size, image_size, 3)


def _bilinear(
    glyphs: Float32[np.ndarray, "k 40 40"], where: Float32[np.ndarray, "k P 2"]
) -> Float32[np.ndarray, "k P"]:
    """Interpolate the ink at points (x, y), in digit sizes from the glyph's centre; 0 outside."""
    at = np.clip((where * _SCAN_SIZE * _ZOOM) + (_GLYPH_SIZE - 1) / 2, 0, _GLYPH_SIZE - 1.001)
    corner = at.astype(np.int32)
    x, y = np.moveaxis(at % 1, -1, 0)
    first = np.arange(len(glyphs))[:, None] * _GLYPH_SIZE**2
    flat, left = glyphs.ravel(), first + corner[..., 1] * _GLYPH_SIZE + corner[..., 0]
    above = flat[left] * (1 - x) + flat[left + 1] * x
    below = flat[left + _GLYPH_SIZE] * (1 - x) + flat[left + _GLYPH_SIZE + 1] * x
    return above * (1 - y) + below * y


class _Writer:
    """Draws numbers with the scans of one split."""

    def __init__(self, indices: Int[np.ndarray, " scans"], jitter: Jitter, image_size: int) -> None:
        labels = _scans()[1][indices]
        self._of_digit = [indices[labels == digit] for digit in range(10)]
        self._jitter, self._image_size = jitter, image_size

    def write(self, number: int, digits: int, rng: np.random.Generator) -> UInt8[np.ndarray, "..."]:
        choices = [self._of_digit[int(digit)] for digit in f"{number:0{digits}d}"]
        scans = np.array([indices[rng.integers(len(indices))] for indices in choices])
        return render(scans, rng, self._image_size, self._jitter)


class DigitsSource:
    """`config.samples` pairs; record i is always the same number, its image and caption vary.

    The train split has the seen numbers by the training writers; the test split has all numbers by
    the held-out writers.
    """

    def __init__(self, config: DigitsConfig, image_size: int) -> None:
        seen, unseen = number_split(config.digits, config.split_seed)
        train, held_out = scan_split()
        if config.split == "train":
            self._numbers = seen
            self._writer = _Writer(train, config.jitter, image_size)
        else:
            self._numbers = sorted(seen + unseen)
            self._writer = _Writer(held_out, HELD_OUT_JITTER, image_size)
        self._config = config
        self._prompts = functools.cache(lambda number: prompts(number, config.digits))

    def __len__(self) -> int:
        return self._config.samples

    def key(self, index: int) -> str:
        turn, row = divmod(index, len(self._numbers))
        return f"{self._numbers[row]:0{self._config.digits}d}/{turn}"

    def load(self, index: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        number = self._numbers[index % len(self._numbers)]
        words = self._prompts(number)
        caption = words[rng.integers(len(words))]
        return self._writer.write(number, self._config.digits, rng), caption


def evaluation_set(
    config: DigitsConfig,
    numbers: Sequence[int],
    per_number: int,
    image_size: int,
    hands: Literal["held out", "training"] = "held out",
) -> tuple[UInt8[np.ndarray, "B H W 3"], Int[np.ndarray, " B"]]:
    """Draw `per_number` images of each number by held-out writers, with the numbers as labels.

    A number always gets the same images; only `config.digits` matters. With `hands="training"` the
    training writers wrote them, as a probe needs for its training set.
    """
    writer = _Writer(scan_split()[hands == "held out"], HELD_OUT_JITTER, image_size)
    images = []
    for number in numbers:
        rng = np.random.Generator(np.random.Philox(key=[_EVALUATION_KEY, number]))
        images += [writer.write(number, config.digits, rng) for _ in range(per_number)]
    return np.stack(images), np.repeat(np.asarray(numbers), per_number)
