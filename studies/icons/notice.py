"""Print the authors and licences of the icon sets that the study uses, for NOTICE.

python studies/icons/notice.py icons/iconify-json-2.2.535.tgz
"""

import sys
from pathlib import Path

import icon_sets


def main(archive: Path) -> None:
    used = {icon.set for icon in icon_sets.read(archive)[0]}
    for collection, content in icon_sets.contents(archive):
        if content["prefix"] in used:
            author = collection["author"]
            parts = (collection["name"], author["name"], collection["license"]["spdx"])
            print(f"  {', '.join(parts)} {author.get('url', '')}".rstrip())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
