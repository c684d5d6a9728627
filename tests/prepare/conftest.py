"""Images, changes of them as in near-duplicates, and readers of prepared shards."""

import dataclasses
import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from clip_jax.convert.formats import write_weights
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource, decode_example
from clip_jax.models.clip import CLIPConfig
from tests.conftest import COCA, TINY, larger, parameters

_SIDE = 160


def encoded(width: int, height: int) -> bytes:
    """Return a green PNG."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), "green").save(file, "PNG")
    return file.getvalue()


def scene(number: int, things: int | None = None) -> Image.Image:
    """Generate a picture with the spatial frequencies of a photograph, and four ellipses.

    `number` determines the background. `things` changes only the ellipses: such pictures look
    alike.
    """
    rng = np.random.default_rng(number)
    frequencies = np.fft.fftfreq(_SIDE)
    power = np.hypot(frequencies[:, None], frequencies)
    power[0, 0] = 1
    noise = np.fft.fft2(rng.standard_normal((2, _SIDE, _SIDE))) / power**1.2
    light, colour = (x / x.std() for x in np.fft.ifft2(noise).real)
    channels = [128 + 45 * light + weight * colour for weight in (-15, 0, 15)]
    image = Image.fromarray(np.clip(np.stack(channels, -1), 0, 255).astype(np.uint8))
    pen, rng = ImageDraw.Draw(image), np.random.default_rng([number, things or 0])
    for _ in range(4):
        x, y = rng.integers(0, _SIDE * 3 // 4, 2).tolist()
        width, height = rng.integers(_SIDE // 5, _SIDE // 2, 2).tolist()
        fill = tuple(rng.integers(0, 256, 3).tolist())
        pen.ellipse((x, y, x + width, y + height), fill=fill)
    return image


def recompressed(image: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(jpeg(image, 30)))


def resized(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BILINEAR)


def cropped(image: Image.Image) -> Image.Image:
    """Crop 2% of the width and the height, more on one side."""
    return image.crop((2, 1, image.width - 1, image.height - 2))


def brightened(image: Image.Image) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(1.3)


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    change.__name__: change for change in (recompressed, resized, cropped, brightened)
}


def jpeg(image: Image.Image, quality: int = 90) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def digests(folder: Path) -> dict[str, str]:
    """Return a hash of each shard of a folder."""
    paths = sorted(folder.glob("*.array_record"))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def records(folder: Path) -> list[dict[str, list[bytes]]]:
    """Return the features of all records of a folder, in order."""
    source = ArrayRecordSource(ArrayRecordConfig(path=str(folder / "*.array_record")))
    return [decode_example(source._read(i, i + 1)[0]) for i in range(len(source))]


def captions(folder: Path) -> list[list[str]]:
    return [[text.decode() for text in record["caption"]] for record in records(folder)]


def tiny_pairs(count: int) -> list[tuple[str, bytes, str]]:
    """Return pairs of noise, as PNG files of 16 pixels."""
    noise = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    pairs = []
    for number, pixels in enumerate(noise):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        pairs.append((f"{number:05d}.png", file.getvalue(), f"text {number}"))
    return pairs


def write_reinforcers(folder: Path, small: CLIPConfig = TINY) -> Path:
    """Write two teachers, of which one has twice the resolution, and a captioner."""
    large = dataclasses.replace(larger(TINY), embed_dim=24, init_logit_bias=-3.0)
    for name, config in (("small", small), ("large", large), ("captioner", COCA)):
        params = jax.tree.map(np.asarray, parameters(config))
        weights = Weights(config=config, params=params, preprocess=default_preprocess(config))
        write_weights(weights, folder / name, "clip-jax")
    return folder


def assert_same_content(one: Any, other: Any) -> None:
    """Compare all fields that are stored with two pairs."""
    pairs = (dataclasses.asdict(more) for more in (one, other))
    jax.tree.map(np.testing.assert_array_equal, *pairs)
