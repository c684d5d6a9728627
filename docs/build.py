"""What the site shows of the code itself: the reference, and the explanations' drawings.

MkDocs calls it as a hook before each build; `python docs/build.py` does the same for others.
"""

import ast
import contextlib
import io
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "clip_jax"

PAGES = {  # title, and the modules or folders that stand there
    "library": ("Library", ("__init__", "inference", "serve")),  # and what has no page
    "models": ("Models", ("models",)),
    "training": (
        "Training",
        ("config", "train", "step", "optim", "sharding", "checkpoints", "metrics", "processes"),
    ),
    "losses": ("Losses", ("losses",)),
    "data": ("Data", ("data", "prepare", "storage", "engine")),
    "evaluation": ("Evaluation", ("evals",)),
    "weights": ("Weights", ("convert",)),
    "pods": ("Pods", ("pods", "flops", "bench")),
    "scaling": ("Scaling", ("scaling",)),
}
# Nothing for a reader's own code:
UNLISTED = ("__main__", "cli", "errors", "serialize", "display")


def write(path: Path, text: str) -> None:
    """Write what has changed: `mkdocs serve` watches the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


# ------------------------------------------------------------------ the reference


def help_of(*command: str) -> str:
    """What a command prints with `--help`."""
    from clip_jax.cli.commands import main

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    text = re.sub(r"\x1b\[[0-9;]*m", "", printed.getvalue())
    return "\n".join(line.rstrip() for line in text.splitlines())


def commands() -> str:
    """One section a command, in the order of `clip-jax --help`."""
    from clip_jax.cli.commands import COMMANDS

    parts = ["# Commands\n", f"```text\n{help_of()}\n```\n"]
    scaling = ("ladder", "collect", "choose", "fit", "report")
    verbs = {"scale": scaling, "bench": ("input", "step")}
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").strip().partition(": clip-jax")[0]
        parts += [f"## clip-jax {name}\n", summary[:1].upper() + summary[1:] + ".\n"]
        if name not in verbs:
            parts.append(f"```text\n{help_of(name)}\n```\n")
        for verb in verbs.get(name, ()):
            parts += [f"### clip-jax {name} {verb}\n", f"```text\n{help_of(name, verb)}\n```\n"]
    return "\n".join(parts)


def modules(name: str) -> list[str]:
    """A module, or a folder's, by their dotted names; those that say what they are."""
    path = PACKAGE / name
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    found = []
    for file in files:
        parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
        if ast.get_docstring(ast.parse(file.read_text())):
            found.append(".".join(part for part in parts if part != "__init__"))
    return found


def rest() -> list[str]:
    """Files and folders of the package that PAGES doesn't name."""
    named = {name for _, names in PAGES.values() for name in names} | {*UNLISTED}
    places = [*PACKAGE.glob("*.py"), *(path.parent for path in PACKAGE.glob("*/__init__.py"))]
    return sorted({path.stem for path in places} - named)


def reference(title: str, names: Sequence[str]) -> str:
    """A page that mkdocstrings fills from the modules' docstrings."""
    parts = [f"# {title}\n"]
    for name in names:
        for module in modules(name):
            own = "    options: {show_submodules: false}\n" if module.count(".") < 2 else ""
            parts += [f"## {module.removeprefix('clip_jax.')}\n", f"::: {module}\n{own}"]
    return "\n".join(parts)


# ------------------------------------------------------------------ drawings


def figure(width: float, height: float, **panels: Any) -> tuple[Figure, Any]:
    from clip_jax.display import STYLE

    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        return drawn, drawn.subplots(**panels)


def order() -> Figure:
    """Which record each position of an epoch reads, by the code that training uses."""
    import grain

    from clip_jax.data.order.blocks import BlockOrder, OfPositions, Streams

    count, streams = 2_048, Streams(64 * 4)
    mixed = np.array(list(grain.MapDataset.range(count).seed(0).shuffle()))
    blocks = BlockOrder(
        np.full(64, count // 64), seed=0, shuffle_blocks=64, shares=OfPositions(streams, count)
    )
    read = np.zeros(count, int)
    for stream in range(streams.count):
        place = np.arange(count // streams.count)
        position = place // streams.width * streams.batch_size + stream * streams.width
        read[position + place % streams.width] = blocks.at(stream, 0, len(place)).record
    drawn, panels = figure(7, 2.8, ncols=2, sharey=True)
    for panel, records, name in zip(panels, (mixed, read), ("global", "blocks"), strict=True):
        colours = np.arange(count) % streams.batch_size // streams.width
        panel.scatter(np.arange(count), records, c=colours, s=1.5, cmap="viridis", rasterized=True)
        panel.set(title=f"data.order = {name}", xlabel="position in the epoch (colour: stream)")
    panels[0].set_ylabel("record")
    return drawn


def losses() -> Figure:
    """Which part of the similarity matrix four devices hold at once, in each form."""
    drawn, panels = figure(7, 2.5, ncols=3)
    for panel, name in zip(panels, ("dense", "blocked", "ring"), strict=True):
        blocks = np.full((4, 4), np.nan)
        for device in range(4):
            columns = {"dense": range(4), "blocked": [1], "ring": [(device + 1) % 4]}[name]
            blocks[device, list(columns)] = device
        panel.imshow(blocks, cmap="viridis", vmin=0, vmax=3)
        panel.set(title=name, xlabel="texts", xticks=range(4), yticks=range(4))
        panel.set_yticklabels([f"device {i}" for i in range(4)])
    return drawn


def sharding() -> Figure:
    """Every parameter of a small CLIP and the mesh axes of its dimensions, from the table."""
    import jax
    from jax.sharding import AbstractMesh

    from clip_jax.models.clip import CLIP, CLIPConfig
    from clip_jax.sharding import param_shardings, path_name

    config = CLIPConfig()
    params = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    laid = param_shardings(config, params, mesh)
    colours = {None: "#dddddd", "fsdp": "#3b528b", "tensor": "#5ec962"}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    drawn, panel = figure(7, 0.17 * len(leaves))
    for row, ((path, x), placed) in enumerate(zip(leaves, jax.tree.leaves(laid), strict=True)):
        axes = [*placed.spec, *[None] * (x.ndim - len(placed.spec))]
        panel.text(-0.2, row, path_name(path), ha="right", va="center", fontsize=7)
        for column, (axis, size) in enumerate(zip(axes, x.shape, strict=True)):
            parts = axis if isinstance(axis, tuple) else (axis,)
            for i, part in enumerate(parts):
                wide = 0.95 / len(parts)
                panel.barh(row, wide, left=column + i * wide, color=colours[part])
            white = "white" if "fsdp" in parts else "black"
            panel.text(column + 0.47, row, size, ha="center", va="center", fontsize=6, color=white)
    for axis, colour in colours.items():
        panel.barh(0, 0, color=colour, label=axis or "whole on every device")
    panel.legend(loc="lower right")
    panel.set(xlim=(-0.1, 6), ylim=(len(leaves), -1))
    panel.axis("off")
    return drawn


def resume() -> Figure:
    """What a kill costs: the steps since the newest checkpoint, done again with the same data."""
    drawn, panel = figure(7, 2.2)
    panel.plot([0, 26], [0, 26], color="#3b528b", label="first process, killed at step 26")
    panel.plot([29, 43], [20, 34], color="#5ec962", label="the same command again")
    panel.scatter([0, 10, 20, 39], [0, 10, 20, 30], color="black", s=14, zorder=3, label="saved")
    panel.axhspan(20, 26, color="#dddddd", label="done twice, with the same samples")
    panel.set(xlabel="time", ylabel="step = data position / batch", xticks=[])
    panel.legend(loc="lower right")
    return drawn


DRAWINGS: tuple[Callable[[], Figure], ...] = (order, losses, sharding, resume)


def on_pre_build(config: Any = None) -> None:
    """Write everything."""
    os.environ["COLUMNS"] = "100"
    write(DOCS / "reference/commands.md", commands())
    for name, (title, names) in PAGES.items():
        names = (*names, *rest()) if name == "library" else names
        write(DOCS / f"reference/{name}.md", reference(title, names))
    for draw in DRAWINGS:
        svg = io.StringIO()
        draw().savefig(svg, format="svg", metadata={"Date": None}, facecolor="white")
        write(DOCS / f"explanation/{draw.__name__}.svg", svg.getvalue())


if __name__ == "__main__":
    on_pre_build()
