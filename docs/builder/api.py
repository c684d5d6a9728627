"""The pages of the Python API, which mkdocstrings fills from docstrings."""

import ast
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clip_jax"

PUBLIC = ("load", "Model", "tokenize", "available_models")  # first on the first page
PAGES = {  # titles, and the modules or folders of each page
    "library": ("Library", ("__init__", "inference", "serve")),  # and what has no page
    "models": ("Models", ("models",)),
    "training": (
        "Training",
        ("config", "train", "step", "optim", "sharding", "checkpoints", "metrics", "processes"),
    ),
    "losses": ("Losses", ("losses",)),
    "data": ("Data", ("data", "prepare", "storage", "engine")),
    "evaluation": ("Evaluation", ("evals",)),
    "weights": ("Weights", ("convert", "export")),
    "pods": ("Pods", ("pods", "flops", "bench")),
    "scaling": ("Scaling", ("scaling",)),
}
UNLISTED = ("__main__", "cli", "errors", "serialize", "display")  # of no use to a reader's code

FIRST = """\
# Library

```py
import clip_jax

model = clip_jax.load("runs/digits")
image = model.encode_image(model.preprocess("photo.jpg"))
text = model.encode_text(model.tokenize(["a cat", "a dog"]))
```

[Use a model in Python](../how-to/library.md) has longer examples.
"""


def modules(name: str) -> list[str]:
    """Return the dotted names of a module, or of a folder's, that have a docstring."""
    path = PACKAGE / name
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    names = []
    for file in files:
        if ast.get_docstring(ast.parse(file.read_text())):
            parts = file.relative_to(ROOT).with_suffix("").parts
            names.append(".".join(part for part in parts if part != "__init__"))
    return names


def rest() -> list[str]:
    """Return the files and folders of the package that PAGES does not name."""
    named = {name for _, names in PAGES.values() for name in names} | {*UNLISTED}
    paths = [*PACKAGE.glob("*.py"), *(path.parent for path in PACKAGE.glob("*/__init__.py"))]
    return sorted({path.stem for path in paths} - named)


def page(title: str, names: Sequence[str], is_first: bool = False) -> str:
    """Write a page; the first one begins with what `import clip_jax` has."""
    parts = [f"# {title}\n"]
    shown = ""
    if is_first:
        parts = [FIRST]
        shown = f', "!^({"|".join(PUBLIC)})$"'
        for name in PUBLIC:
            owner = "clip_jax.inference.loading" if name == "Model" else "clip_jax"
            parts.append(f"::: {owner}.{name}\n    options: {{heading_level: 2}}\n")
    for name in names:
        for module in modules(name):
            submodules = ", show_submodules: false" if module.count(".") < 2 else ""
            filters = f'filters: ["!^_"{shown}]'
            parts.append(
                f"::: {module}\n    options: {{heading_level: 2, {filters}{submodules}}}\n"
            )
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """Write all pages, by file name."""
    texts = {}
    for name, (title, names) in PAGES.items():
        is_first = name == "library"
        texts[f"{name}.md"] = page(title, (*names, *rest()) if is_first else names, is_first)
    return texts
