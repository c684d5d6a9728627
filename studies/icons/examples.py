"""Copy some test icons, of sets that the model has not seen, for the README and the tests.

python studies/icons/examples.py icons/classes/test studies/icons/examples
"""

import shutil
import sys
from pathlib import Path

CLASSES = (
    *("anchor", "bell", "bicycle", "calendar", "camera", "cloud", "fish", "gift"),
    *("heart", "home", "key", "leaf", "rocket", "star", "trash", "umbrella"),
)
# Test sets of the licences MIT, Apache-2.0 and Unlicense.
SETS = (
    *("akar-icons", "bi", "carbon", "f7", "grommet-icons", "iconoir"),
    *("jam", "octicon", "oi", "system-uicons", "teenyicons", "vaadin"),
)
OF_EACH = 5


def main(folder: Path, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for number, label in enumerate(CLASSES):
        in_turn = SETS[number % len(SETS) :] + SETS[: number % len(SETS)]
        files = [folder / label / f"{name}.png" for name in in_turn]
        for file in [file for file in files if file.exists()][:OF_EACH]:
            shutil.copyfile(file, output / f"{label}-{file.name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
