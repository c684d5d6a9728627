"""Classify test icons by the nearest training icon in pixels: what a model has to beat.

python studies/icons/pixels.py icons/classes
"""

import sys
from pathlib import Path

import numpy as np
from accuracy import interval
from PIL import Image


def main(classes: Path) -> None:
    train = sorted((classes / "train").glob("*/*.png"))
    test = sorted((classes / "test").glob("*/*.png"))
    nearest = (unit(test) @ unit(train).T).argmax(axis=1)
    is_right = np.array(
        [
            train[index].parent.name == file.parent.name
            for index, file in zip(nearest, test, strict=True)
        ]
    )
    _, set_of = np.unique([file.stem for file in test], return_inverse=True)
    print(f"{len(train):,} training icons, {len(test):,} test icons of {set_of.max() + 1} sets")
    print(f"acc1: {interval(set_of, is_right)}")


def unit(files: list[Path]) -> np.ndarray:
    """Return the pixels of gray images, centred and of unit length."""
    pixels = np.stack([np.asarray(Image.open(file).convert("L"), np.float32) for file in files])
    pixels = pixels.reshape(len(files), -1)
    pixels -= pixels.mean(axis=1, keepdims=True)
    return pixels / np.linalg.norm(pixels, axis=1, keepdims=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
