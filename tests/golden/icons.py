"""Write icons.tgz: some icons of four CC0 sets of npm's `@iconify/json`, in its layout.

Three small sets of our own have what these lack: another licence, logos, a copy of a test icon.

    python tests/golden/icons.py ICONIFY_JSON.tgz
"""

import gzip
import io
import json
import random
import sys
import tarfile
from pathlib import Path
from typing import Any

COUNTS = {"maki": 110, "osmic": 80, "pinhead": 160, "temaki": 110}
OWN = {
    "other": {"license": {"spdx": "GPL-3.0-only"}},
    "marks": {"license": {"spdx": "CC0-1.0"}, "category": "Logos"},
    "shapes": {"license": {"spdx": "CC0-1.0"}},
}
SQUARE = {"body": '<path fill="currentColor" d="M2 2h12v12H2z"/>'}


def main(archive: Path) -> None:
    rng = random.Random(0)
    with tarfile.open(archive) as tar:
        files = {name: json.load(tar.extractfile(f"package/{path(name)}")) for name in COUNTS}
        collections = json.load(tar.extractfile("package/collections.json"))
    others = {name for name in COUNTS if name != "pinhead"}
    for name, content in files.items():
        elsewhere = {key for other in others - {name} for key in files[other]["icons"]}
        content["icons"] = chosen(content["icons"], COUNTS[name], elsewhere, rng)
        content["aliases"] = {
            alias: entry
            for alias, entry in content.get("aliases", {}).items()
            if entry["parent"] in content["icons"]
        }
        for field in ("info", "chars", "categories", "lastModified"):
            content.pop(field, None)
    files |= {name: {"prefix": name, "icons": {"square": SQUARE}} for name in OWN}
    original = files["temaki"]["icons"]["airport"]
    paler = original | {"body": f'<g opacity=".95">{original["body"]}</g>'}
    size = {field: files["temaki"][field] for field in ("width", "height")}
    files["shapes"] |= {"icons": {"logo-square": SQUARE, "paler": paler}} | size
    content = {"collections.json": {name: collections[name] for name in COUNTS} | OWN}
    content |= {path(name): file for name, file in files.items()}
    write(content, Path(__file__).with_name("icons.tgz"))


def path(name: str) -> str:
    return f"json/{name}.json"


def chosen(
    icons: dict[str, Any], count: int, elsewhere: set[str], rng: random.Random
) -> dict[str, Any]:
    """Choose icons, those first whose names another set has, too."""
    names = sorted(icons, key=lambda name: (name not in elsewhere, rng.random()))
    visible = [name for name in names if not icons[name].get("hidden")]
    hidden = [name for name in names if icons[name].get("hidden")]
    return {name: icons[name] for name in sorted(visible[:count] + hidden[:5])}


def write(content: dict[str, Any], archive: Path) -> None:
    """Write the same bytes each time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, value in content.items():
            data = json.dumps(value, separators=(",", ":")).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    archive.write_bytes(gzip.compress(buffer.getvalue(), mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
