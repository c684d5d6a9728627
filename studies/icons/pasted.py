"""Write the sheet of icons that the bundled data set `pasted_icons` pastes on photographs.

    python studies/icons/pasted.py icons clip_jax/evals/pasted_icons.png

It has a row of icons for each class, and columns for training, validation and testing, drawn in
black on white. `icons` is the folder that prepare.py has written; a fixed seed chooses the icons.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from clip_jax.evals.pasted_icons import COLUMNS, NAMES, TILE

FOLDERS = {"train": "train", "validation": "val", "test": "test"}


def main(icons: Path, output: Path) -> None:
    width = max(last for _, last in COLUMNS.values())
    sheet = np.full((len(NAMES) * TILE, width * TILE), 255, np.uint8)
    for row, name in enumerate(NAMES):
        for split, (first, last) in COLUMNS.items():
            folder = icons / "classes" / FOLDERS[split] / name.replace(" ", "_")
            files = sorted(folder.glob("*.png"))
            chosen = np.random.default_rng(row).permutation(len(files))[: last - first]
            for column, index in enumerate(sorted(chosen), first):
                with Image.open(files[index]) as image:
                    at = np.s_[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
                    sheet[at] = np.asarray(image.convert("L").resize((TILE, TILE)))
    Image.fromarray(sheet).quantize(16).save(output, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
