"""The bundled data set to be segmented: icons on tiles, pasted on photographs, so masks are known.

The icons of test images are from sets of which neither the training images nor the training of the
model `icons` have any; their photograph is another one, too. The sheet of icons was made by
`studies/icons/pasted.py`.
"""

import functools
from importlib import resources

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image, ImageDraw

from clip_jax.evals.datasets import Segmented, Split

NAMES = (
    *("bell", "calendar", "camera", "chat", "check", "clock", "file", "filter", "home", "image"),
    *("info", "mail", "phone", "plus", "search", "settings", "shopping cart", "star", "trash"),
    "user",
)
TILE = 32  # pixels of an icon on the sheet, which has a row for each class
COLUMNS: dict[Split, tuple[int, int]] = {"train": (0, 8), "validation": (8, 12), "test": (12, 24)}
_COUNTS: dict[Split, int] = {"train": 240, "validation": 60, "test": 120}  # of images
_SIDE = 96  # pixels of an image
_SIZES = 28, 44  # pixels of a tile, from and up to
_SEEDS: dict[Split, int] = {"train": 0, "validation": 1, "test": 2}
# Ink and tile, both light on dark and dark on light.
_COLOURS = (
    *(((0, 0, 0), (255, 255, 255)), ((31, 41, 55), (243, 244, 246)), ((29, 78, 216), (255,) * 3)),
    *(
        ((185, 28, 28), (254, 242, 242)),
        ((21, 128, 61), (247, 254, 231)),
        ((255,) * 3, (17, 24, 39)),
    ),
)


def open_pasted_icons(split: Split) -> Segmented:
    """Draw the images of a split; the answer is the class of each pixel, the first "background"."""
    return Segmented(
        _COUNTS[split],
        functools.partial(_draw, split),
        ("background", *NAMES),
        ("{c}", "{c} icon", "an icon of {c}", "a {c} symbol"),
        key=lambda i: f"{split} {i}",
    )


@functools.lru_cache(maxsize=1024)
def _draw(split: Split, index: int) -> tuple[UInt8[np.ndarray, "H W 3"], Int[np.ndarray, "H W"]]:
    rng = np.random.default_rng([_SEEDS[split], index])
    picture, mask = _photograph(split, rng), Image.new("L", (_SIDE, _SIDE))
    first, last = COLUMNS[split]
    quarters = rng.permutation(4)[: rng.integers(1, 4)]
    for quarter in quarters:  # of the image, so that tiles do not overlap
        size = int(rng.integers(*_SIZES))
        spare = _SIDE // 2 - size
        left, top = (
            int(part * _SIDE // 2 + rng.integers(spare + 1)) for part in divmod(quarter, 2)
        )
        number = int(rng.integers(len(NAMES)))
        icon = _sheet()[number * TILE :][:TILE, int(rng.integers(first, last)) * TILE :][:, :TILE]
        ink, tile = _COLOURS[rng.integers(len(_COLOURS))]
        shape = Image.new("L", (size, size))
        ImageDraw.Draw(shape).rounded_rectangle(
            (0, 0, size - 1, size - 1), float(rng.uniform(0, size / 2)), fill=255
        )
        strokes = Image.fromarray(255 - icon).resize((size, size), Image.Resampling.BICUBIC)
        drawn = Image.new("RGB", (size, size), tile)
        drawn.paste(ink, mask=strokes)
        picture.paste(drawn, (left, top), shape)
        mask.paste(number + 1, (left, top), shape)
    return np.asarray(picture), np.asarray(mask).astype(np.int64)


def _photograph(split: Split, rng: np.random.Generator) -> Image.Image:
    """Cut a random square out of a photograph: of one for testing, of another for the rest."""
    name = "cat" if split == "test" else "coffee"
    path = resources.files("clip_jax") / f"convert/photographs/{name}.jpg"
    with path.open("rb") as file, Image.open(file) as image:
        side = int(rng.integers(_SIDE, min(image.size)))
        left, top = (int(rng.integers(length - side + 1)) for length in image.size)
        square = image.convert("RGB").crop((left, top, left + side, top + side))
    return square.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)


@functools.cache
def _sheet() -> UInt8[np.ndarray, "H W"]:
    """Return the sheet of icons, black on white."""
    path = resources.files("clip_jax.evals") / "pasted_icons.png"
    with path.open("rb") as file, Image.open(file) as image:
        return np.asarray(image.convert("L"))
