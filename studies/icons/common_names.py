"""Write names.txt: the names that occur in the most icon sets, with the most common first.

python studies/icons/common_names.py icons/iconify-json-2.2.535.tgz
"""

import sys
from collections import defaultdict
from pathlib import Path

import icon_sets

COUNT = 300


def main(archive: Path) -> None:
    icons, _ = icon_sets.read(archive)
    sets = defaultdict(set)
    for icon in icons:
        sets[icon.names[0]].add(icon.set)
    names = sorted(sets, key=lambda name: (-len(sets[name]), name))
    text = "\n".join(names[:COUNT])
    (icon_sets.HERE / "names.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
