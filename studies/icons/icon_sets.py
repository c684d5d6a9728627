"""The icons that the study uses, read from the archive of npm's `@iconify/json`."""

import json
import re
import tarfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import captions
import tables

HERE = Path(__file__).parent
LICENCES = {
    "Apache-2.0",
    "BSD-3-Clause",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC0-1.0",
    "ISC",
    "MIT",
    "MPL-2.0",
    "OFL-1.1",
    "Unlicense",
}
SPLITS = ("test", "validation", "train")  # of equal drawings, the first of this order stays


@dataclass(frozen=True)
class Icon:
    """A drawing with the names and the style that its designers gave it."""

    set: str
    name: str  # as the package writes it
    names: tuple[str, ...]  # the name and its aliases in words, without words of style
    style: str
    split: str
    box: tuple[float, float, float, float]  # left, top, width, height
    body: str  # inside of <svg>
    is_monochrome: bool

    @property
    def key(self) -> str:
        return f"{self.set}/{self.name}"


def read(archive: Path, table: Path = HERE / "sets.csv") -> tuple[list[Icon], Counter[str]]:
    """Return the icons to use, and the number of icons that each stage leaves out.

    `table` says in which split a set is, and what its names say about its style.
    """
    sets = {row["set"]: row for row in tables.read(table)}
    brands = Brands()
    counts: Counter[str] = Counter()
    icons = []
    for collection, content in contents(archive):
        row = sets.get(content["prefix"])
        stage = _left_out(collection, row)
        aliases = captions.aliases(content)
        for name, icon in content["icons"].items():
            counts["read"] += 1
            if icon.get("hidden"):
                counts["hidden"] += 1
            elif stage:
                counts[stage] += 1
            else:
                assert row is not None
                texts = (name, *aliases[name])
                drawing = _icon(texts, content, row, not collection.get("palette"))
                if brands.names(name) or any(map(brands.names, drawing.names)):
                    counts["brand"] += 1
                else:
                    icons.append(drawing)
    icons.sort(key=lambda icon: (SPLITS.index(icon.split), icon.set, icon.name))
    distinct: dict[tuple, Icon] = {}
    for icon in icons:
        distinct.setdefault((icon.box, icon.body), icon)
    counts["equal drawing"] = len(icons) - len(distinct)
    return list(distinct.values()), counts


class Brands:
    """Recognises trademarks by the words of a name."""

    def __init__(self) -> None:
        table = tables.read(HERE / "brands.csv")
        self._names = {row["brand"] for row in table if row["match"] == "name"}
        parts = "|".join(re.escape(row["brand"]) for row in table if row["match"] == "words")
        self._words = re.compile(f"(^|-)({parts})(-|$)")

    def names(self, name: str) -> bool:
        """Return whether the name is that of a trademark, or has one in it."""
        name = name.replace(" ", "-")
        return name in self._names or bool(self._words.search(name))


def contents(archive: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Return each set's row of `collections.json`, with the content of its own file."""
    files = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if re.fullmatch(r"package/(collections|json/[\w-]+)\.json", member.name):
                file = tar.extractfile(member)
                assert file is not None
                files[member.name] = json.loads(file.read())
    collections = files["package/collections.json"]
    return [(collections[name], files[f"package/json/{name}.json"]) for name in sorted(collections)]


def _left_out(collection: dict[str, Any], row: dict[str, str] | None) -> str:
    """Return the stage that leaves out a set; empty if it is used."""
    if collection["license"].get("spdx") not in LICENCES:
        return "licence"
    if collection.get("category") == "Logos":
        return "brand"
    if row is None:
        return "not in sets.csv"
    return row["left out"]


def _icon(
    texts: tuple[str, ...], content: dict[str, Any], row: dict[str, str], is_monochrome: bool
) -> Icon:
    """Make an icon of its name and aliases."""
    icon = content["icons"][texts[0]]
    left, top, width, height = (
        icon.get(field, content.get(field, default))
        for field, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    prefixes, suffixes = captions.style_words(content, row)
    words = [captions.split_name(text, prefixes, suffixes) for text in texts]
    return Icon(
        set=content["prefix"],
        name=texts[0],
        names=tuple(dict.fromkeys(name for name, _ in words)),
        style=" ".join(filter(None, (words[0][1], row["style"]))),
        split=row["split"],
        box=(left, top, width, height),
        body=icon["body"],
        is_monochrome=is_monochrome,
    )


def classes() -> dict[str, str]:
    """Return the class of each name of names.txt, and of the synonyms of these.

    A class has the name of its line in synonyms.csv.
    """
    class_of = {
        name: row["name"]
        for row in tables.read(HERE / "synonyms.csv")
        for name in (row["name"], *row["synonyms"].split(", "))
    }
    names = (HERE / "names.txt").read_text(encoding="utf-8").splitlines()
    chosen = {class_of.get(name, name) for name in names}
    return {name: name for name in chosen} | {
        name: label for name, label in class_of.items() if label in chosen
    }
