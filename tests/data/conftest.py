"""Photographs that come with scikit-image and scikit-learn, as files with a table of pairs."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SIDE = 48


@pytest.fixture(scope="session")
def photographs() -> dict[str, np.ndarray]:
    """RGB photographs by name, made small."""
    import skimage
    import sklearn.datasets

    pixels = {Path(name).stem: image for name, image in _sklearn_images(sklearn.datasets)}
    folder = Path(skimage.__file__).parent / "data"
    for name in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"):
        pixels[Path(name).stem] = np.asarray(Image.open(folder / name).convert("RGB"))
    small = {}
    for name, image in pixels.items():
        height, width = image.shape[:2]
        size = (SIDE * width // min(height, width), SIDE * height // min(height, width))
        small[name] = np.asarray(Image.fromarray(image).resize(size))
    return small


def _sklearn_images(datasets):
    images = datasets.load_sample_images()
    return zip(images.filenames, images.images, strict=True)


@pytest.fixture(scope="session")
def write_pairs(photographs) -> Callable[..., Path]:
    """`write_pairs(folder, count, suffix)` writes image files and the table that lists them."""

    def write(folder: Path, count: int, suffix: str = ".csv") -> Path:
        names = list(photographs)
        rows = []
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            name = names[i % len(names)]
            shifted = np.roll(photographs[name], i, axis=1)
            file = f"images/{i:04d}.{('png', 'jpg', 'webp')[i % 3]}"
            Image.fromarray(shifted).save(folder / file)
            rows.append((file, f'a photo of "{name}",\nnumber {i}'))
        table = folder / f"pairs{suffix}"
        with table.open("w", newline="") as out:
            if suffix == ".jsonl":
                for image, caption in rows:
                    out.write(json.dumps({"image": image, "caption": caption}) + "\n")
            else:
                writer = csv.writer(out, delimiter="," if suffix == ".csv" else "\t")
                writer.writerows([("image", "caption"), *rows])
        return table

    return write
