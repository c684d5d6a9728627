"""Captions: the words of an icon's name and of its style, in the study's templates."""

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Templates of the evaluation. Training draws from these and from STYLED.
TEMPLATES = (Path(__file__).parent / "templates.txt").read_text(encoding="utf-8").splitlines()
STYLED = ("{style} {name}", "{style} icon of {name}")
_SIZE = re.compile(r"\d+(px)?(x\d+)?")
_PLAIN = {"regular", "basic", "default", "path", "colors", "branded"}  # say nothing about a style


def of_icon(names: tuple[str, ...], style: str) -> list[str]:
    """Return all captions of an icon, of which training draws one each time."""
    templates = TEMPLATES + [text.replace("{style}", style) for text in STYLED if style]
    return [
        template.replace("{name}", name).replace("{}", name)
        for name in names
        for template in templates
    ]


def style_words(
    content: Mapping[str, Any], row: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Return the prefixes and the suffixes by which a set names its styles, and what they mean.

    They are those of the set's own file and, for sets whose file has none, of sets.csv.
    """
    pairs = (text.partition(":") for text in row["suffixes"].split())
    suffixes = {suffix: style if colon else suffix for suffix, colon, style in pairs}
    own = content.get("suffixes") or {}
    return (
        {key: _style(title) for key, title in (content.get("prefixes") or {}).items()},
        {key: _style(title) for key, title in (suffixes | own).items()},
    )


def split_name(
    name: str, prefixes: Mapping[str, str], suffixes: Mapping[str, str]
) -> tuple[str, str]:
    """Split a name into its words and those of its style: home-outline is ("home", "outline")."""
    for prefix, style in prefixes.items():
        if name.startswith(f"{prefix}-"):
            return _words(name.removeprefix(f"{prefix}-")), style
    for suffix in sorted(suffixes, key=len, reverse=True):
        if suffix and name.endswith(f"-{suffix}"):
            return _words(name.removesuffix(f"-{suffix}")), suffixes[suffix]
    return _words(name), suffixes.get("", "")


def aliases(content: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return other names of each drawing of a set.

    Left out are those that turn or flip the drawing, codes (owm-300), and longer forms of a name
    (bx-fork).
    """
    names = defaultdict(list)
    for alias, entry in (content.get("aliases") or {}).items():
        name = entry["parent"]
        if entry.keys() == {"parent"} and name not in alias and not re.search(r"\d", alias):
            names[name].append(alias)
    return names


def _words(name: str) -> str:
    return " ".join(filter(None, name.split("-")))


def _style(title: str) -> str:
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", title).lower().replace("-", " ").split()
    return " ".join(word for word in words if word not in _PLAIN and not _SIZE.fullmatch(word))
