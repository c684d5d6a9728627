"""The pages of the Python API, which mkdocstrings fills from docstrings."""

import ast
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "clip_jax"

SECTIONS = {  # of the first page, which has the names of clip_jax/__init__.pyi
    "Use a model": (
        *("load", "load_on_mesh", "create_model", "Model"),
        *("tokenize", "available_models", "InputError"),
    ),
    "Train": (
        *("train_model", "load_config", "Config", "start_processes", "MeshConfig", "make_mesh"),
        *("open_data", "Program", "Checkpoints", "catch_sigterm"),
    ),
    "Models and losses as functions": (
        *("CLIP", "CLIPConfig", "contrastive_loss", "SoftmaxConfig", "SigmoidConfig"),
    ),
    "Evaluate, convert, export": ("evaluate_model", "convert_model", "export_model"),
}
PAGES = {  # titles, and the modules or folders of each page
    "inference": ("Inference", ("inference", "serve")),  # and what has no page
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
# Public API

These names are imported from `clip_jax`. They are what we keep stable: the changelog announces
every change of theirs. The pages that follow describe the modules behind them, which may change in
any release.

```py
import clip_jax

model = clip_jax.load("runs/digits")
image = model.encode_image(model.preprocess("photo.jpg"), normalize=True)
text = model.encode_text(model.tokenize(["a cat", "a dog"]), normalize=True)
```

[Use a model in Python](../how-to/library.md) and
[Train from Python](../how-to/train-from-python.md) show them at work.
"""


def public() -> dict[str, str]:
    """Return the module that defines each public name."""
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    return {
        alias.name: f"clip_jax.{node.module}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


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


def first_page() -> str:
    """Write the page of the public names. Raises ValueError unless SECTIONS has each of them."""
    modules_of = public()
    if sorted(name for names in SECTIONS.values() for name in names) != sorted(modules_of):
        raise ValueError("SECTIONS in docs/builder/api.py and clip_jax/__init__.pyi differ")
    parts = [FIRST]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}\n")
        for name in names:
            options = "{heading_level: 3, show_root_full_path: false}"
            parts.append(f"::: {modules_of[name]}.{name}\n    options: {options}\n")
    return "\n".join(parts)


def page(title: str, names: Sequence[str]) -> str:
    """Write the page of some modules, without the names of the first page."""
    parts = [f"# {title}\n"]
    for name in names:
        for module in modules(name):
            submodules = ", show_submodules: false" if module.count(".") < 2 else ""
            shown = "|".join(x for x, defined_in in public().items() if defined_in == module)
            filters = f'["!^_", "!^({shown})$"]' if shown else '["!^_"]'
            options = f"{{heading_level: 2, filters: {filters}{submodules}}}"
            parts.append(f"::: {module}\n    options: {options}\n")
    return "\n".join(parts)


def pages() -> dict[str, str]:
    """Write all pages, by file name."""
    texts = {"library.md": first_page()}
    for name, (title, names) in PAGES.items():
        texts[f"{name}.md"] = page(title, (*names, *rest()) if name == "inference" else names)
    return texts
