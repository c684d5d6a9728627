"""Draw test icons of some classes, one row for each class and one column for each set.

python studies/icons/sheet.py icons/classes/test studies/icons/results/classes.png
"""

import sys
from pathlib import Path

from PIL import Image

CLASSES = (
    *("home", "settings", "search", "trash", "bell", "lock"),
    *("user", "cloud", "calendar", "refresh", "star", "umbrella"),
)
GAP = 4


def main(folder: Path, output: Path) -> None:
    sets = sorted({file.stem for file in folder.glob("*/*.png")})
    with Image.open(next(folder.glob("*/*.png"))) as picture:
        step = picture.width + GAP
    sheet = Image.new("RGB", (step * len(sets) + GAP, step * len(CLASSES) + GAP), "white")
    for row, label in enumerate(CLASSES):
        for column, name in enumerate(sets):
            file = folder / label / f"{name}.png"
            if file.exists():
                with Image.open(file) as picture:
                    sheet.paste(picture.convert("RGB"), (GAP + column * step, GAP + row * step))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
