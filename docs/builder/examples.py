"""A Griffe extension that shows the examples of docstrings as code."""

import re
import textwrap
from typing import Any

import griffe

# A prompt and all lines up to the next empty one; in a docstring they may be indented.
EXAMPLE = re.compile(r"^ *>>> .*(?:\n.+)*", re.M)


class Examples(griffe.Extension):
    """Fence the examples (`>>> `) of docstrings, which Markdown reads as nested quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(text: str) -> str:
    """Return a docstring with its examples in fences."""
    return EXAMPLE.sub(lambda match: f"```pycon\n{textwrap.dedent(match[0])}\n```", text)
