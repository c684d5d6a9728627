"""A Griffe extension that adds fields and their meanings to the docstrings of dataclasses."""

import html
from typing import Any

import griffe

from builder import settings


class DataclassFields(griffe.Extension):
    """Add to a dataclass's docstring a table of its fields, or a link to the one that exists."""

    def on_class_members(self, *, node: Any, cls: griffe.Class, **_: Any) -> None:
        if not any("dataclass" in str(decorator.value) for decorator in cls.decorators):
            return
        meanings = {name: text for name, text in settings.comments_in(cls.source).items() if text}
        if cls.canonical_path in settings.shown:
            text = f"Fields and flags: [{cls.name}][{cls.name}]."
        elif meanings:
            rows = [
                f"| `{name}` | {_code(str(cls.members[name].annotation))} "
                f"| {settings.cell(settings.escape(text[:1].upper() + text[1:]))} |"
                for name, text in meanings.items()
                if not name.startswith("_")
            ]
            text = "\n".join(["| field | type | meaning |", "|---|---|---|", *rows])
        else:
            return
        before = cls.docstring.value if cls.docstring else ""
        cls.docstring = griffe.Docstring(f"{before}\n\n{text}", parent=cls)


def _code(text: str) -> str:
    """Format code whose bars do not end a table's cell; Markdown shows entities as they are."""
    return f"<code>{settings.cell(html.escape(text))}</code>"
