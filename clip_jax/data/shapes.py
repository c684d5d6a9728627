"""Sample data of `clip-jax sample-data`: drawn shapes as class folders, as a table and as tars."""

import csv
import io
import itertools
import math
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from clip_jax.errors import InputError, check_ranges
from clip_jax.storage import files

_COLORS = {
    "red": (210, 45, 45), "orange": (240, 140, 30), "yellow": (240, 210, 50),
    "green": (50, 150, 70), "blue": (50, 90, 200), "purple": (130, 60, 170),
}  # fmt: skip
_SHAPES = {  # distances of the corners from the centre, repeated around it
    "circle": [1.0] * 48, "square": [1.0] * 4, "triangle": [1.0] * 3, "star": [1.0, 0.4] * 5,
}  # fmt: skip
_UNSEEN = ("red star", "yellow triangle", "green circle", "blue square")  # only in folders/test
_PAIRS_PER_TAR = 200


@dataclass(frozen=True, kw_only=True)
class SampleDataConfig:
    """Drawn shapes in six colours: 24 classes, of which four are left out of training."""

    output: str  # New folder, local or gs://, s3://.
    train: int = 40  # Number of training images per class.
    test: int = 10  # Number of test images per class.
    size: int = 64  # Width and height of the images, in pixels.
    aspect: float = 1.0  # Largest aspect ratio of the canvases, at the area of size; 1: squares.
    seed: int = 0  # Random seed of the drawings.
    dark: bool = False  # Draw in dim light, and train on all classes: a data set to fine-tune on.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            train="[1, inf)",
            test="[1, inf)",
            size="[8, inf)",
            aspect="[1, 16]",
            seed="[0, inf)",
        )


def write(config: SampleDataConfig) -> dict[str, int | str]:
    """Write the class folders `folders/train` and `folders/test`, and the training images with
    captions as the table `pairs.csv` and as `tars/*.tar` (WebDataset).

    Returns the numbers of images and classes. Raises InputError if the output exists.
    """
    output = files.as_path(config.output)
    if output.exists():
        raise InputError(f"{output} exists already; choose another OUTPUT, or delete it.")
    files.check_destination(output, "OUTPUT")
    rng = np.random.default_rng(config.seed)
    with files.written_whole(output) as partial:
        pairs = []
        for color, shape in itertools.product(_COLORS, _SHAPES):
            for split, count in (("train", config.train), ("test", config.test)):
                if split == "train" and f"{color} {shape}" in _UNSEEN and not config.dark:
                    continue
                folder = partial / "folders" / split / f"{color}_{shape}"
                folder.mkdir(parents=True)
                for number in range(count):
                    image, caption = draw(color, shape, config, rng)
                    image.save(path := folder / f"{number:03d}.png")
                    if split == "train":
                        pairs.append((path, caption))
        with (partial / "pairs.csv").open("w", newline="", encoding="utf-8") as file:
            rows = ((path.relative_to(partial).as_posix(), caption) for path, caption in pairs)
            csv.writer(file).writerows([("image", "caption"), *rows])
        order = rng.permutation(len(pairs))
        _write_tars(partial / "tars", [pairs[i] for i in order])
    classes = len(_COLORS) * len(_SHAPES)
    counts = {"train": len(pairs), "test": classes * config.test, "classes": classes}
    return {"output": str(output), **counts, "unseen_classes": 0 if config.dark else len(_UNSEEN)}


def draw(
    color: str, shape: str, config: SampleDataConfig, rng: np.random.Generator
) -> tuple[Image.Image, str]:
    """Draw one shape of random size, place and background on a canvas of `size`² pixels, and say
    what it is: "a small red circle on the left". `aspect` bounds the random aspect ratio, which is
    log-uniform."""
    stretch = config.aspect ** rng.uniform(-0.5, 0.5) if config.aspect > 1 else 1.0
    canvas = np.array([round(config.size * stretch), round(config.size / stretch)])
    radius = rng.uniform(0.2, 0.45)  # as a share of the shorter side
    reach = radius * (canvas.min() / canvas)  # as a share of each side
    x, y = rng.uniform(reach, 1 - reach)
    distances = _SHAPES[shape]
    turn = rng.uniform(-0.3, 0.3) + (math.pi / 4 if shape == "square" else -math.pi / 2)
    corners = [
        (x + reach[0] * r * math.cos(angle), y + reach[1] * r * math.sin(angle))
        for i, r in enumerate(distances)
        for angle in [turn + 2 * math.pi * i / len(distances)]
    ]
    shade, light = rng.integers(-25, 26, 3), rng.integers(190, 256, 3)
    fill = np.clip(np.array(_COLORS[color]) + shade, 0, 255)
    if config.dark:
        fill, light = fill * 3 // 5, light - 100
    large = Image.new("RGB", tuple(4 * canvas), tuple(light.tolist()))
    scaled = [tuple(4 * canvas * corner) for corner in corners]
    ImageDraw.Draw(large).polygon(scaled, fill=tuple(fill.tolist()))
    where = "on the left" if x < 0.42 else "on the right" if x > 0.58 else "in the middle"
    caption = f"a {'small' if radius < 0.32 else 'large'} {color} {shape} {where}"
    return large.resize(tuple(canvas), Image.Resampling.BOX), caption


def _write_tars(folder: Path, pairs: list[tuple[Path, str]]) -> None:
    folder.mkdir()
    for shard in range(-(-len(pairs) // _PAIRS_PER_TAR)):
        some = pairs[shard * _PAIRS_PER_TAR : (shard + 1) * _PAIRS_PER_TAR]
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number, (path, caption) in enumerate(some):
                key = f"{shard:05d}{number:04d}"
                for name, content in ((".png", path.read_bytes()), (".txt", caption.encode())):
                    member = tarfile.TarInfo(key + name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
