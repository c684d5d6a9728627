"""Find words that this project does not use, since the field has others.

    python -m tests.words FILE ...

prints each of them in pages (.md) and Python files, with its line; the exit code is then 1. Of a
Python file it reads comments and docstrings, from which the help texts are made, and of the package
also the names. `docs/reference/glossary.md` has the words of the field.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PRIVATE = (
    "table of words", "never-seen", "what is kept back", "what ships inside", "own cosine", "trunk",
    "one by one ≤", "hard ≤", "compiler ≈", "slices ms", "features of unit length", "lies whole",
    "encoding in chunks", "tides", "dealt",
)  # fmt: skip
# As names, these say nothing of what they name: a position, a message, a path, rows.
VAGUE = {"found", "told", "said", "asked", "given", "whole", "there", "place"}
# `peers` is the name of an extra, and not a word for other projects.
_EXTRA = re.compile(r"`peers`|\[[\w,-]*\bpeers\b[\w,-]*\]|test,peers|peers,")


def in_text(text: str) -> list[str]:
    """Return the words of PRIVATE in a text, and `peers` where it is not the extra."""
    words = [word for word in PRIVATE if word in text.lower()]
    return words + ["peers"] * bool(re.search(r"\bpeers\b", _EXTRA.sub("", text)))


def in_names(tree: ast.AST) -> list[tuple[int, str]]:
    """Return the line and the word of each name in a module that is vague."""
    lines = []
    for node in ast.walk(tree):
        names = [getattr(node, x, None) for x in ("id", "arg", "attr", "name", "asname")]
        line = getattr(node, "lineno", 0)
        lines += [(line, name) for name in names if isinstance(name, str) and name in VAGUE]
    return lines


def in_comments_and_docstrings(code: str) -> list[tuple[int, str]]:
    """Return the line and the word of each private word in a module's comments and docstrings."""
    texts = [
        (token.start[0], token.string)
        for token in tokenize.generate_tokens(io.StringIO(code).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(ast.parse(code)):
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        if isinstance(node, kinds) and (text := ast.get_docstring(node)):
            texts.append((node.body[0].lineno, text))
    return [(line, word) for line, text in texts for word in in_text(text)]


def misused(path: Path) -> Iterator[str]:
    """Yield a line for each word of a file that the project does not use."""
    text = path.read_text()
    if path.suffix == ".md":
        lines = [(n, word) for n, x in enumerate(text.split("\n"), 1) for word in in_text(x)]
    else:
        lines = in_comments_and_docstrings(text)
        if path.resolve().is_relative_to(ROOT / "clip_jax"):
            lines += in_names(ast.parse(text))
    for line, word in sorted(lines):
        yield f"{path}:{line}: {word!r} is no word of this project; see docs/reference/glossary.md"


def main() -> int:
    lines = [line for name in sys.argv[1:] for line in misused(Path(name))]
    print(*lines, sep="\n", end="\n" if lines else "")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
