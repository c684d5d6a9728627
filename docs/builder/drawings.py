"""The explanations' drawings, each for a light and for a dark page."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Readable on both backgrounds, and apart for colour-blind readers; white text fits on them.
DEVICES = ("#3b7dd8", "#d9822b", "#2e9e6b", "#b5539c")
THEMES = {  # suffix of the file's name; colours of text and lines, of what stands back
    "": ("#24292f", "#d5d8dd"),
    "-dark": ("#dfe2e8", "#4b5161"),
}


def faint() -> str:
    """Return the colour of what stands back, which the theme sets as the grid's."""
    return matplotlib.rcParams["grid.color"]


def figure(width: float, height: float, **panels: Any) -> tuple[Figure, Any]:
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(**panels)


def box(panel: Axes, x: float, y: float, width: float, text: str, color: str) -> None:
    """Draw a box of height 0.8 around y, with a text in it."""
    panel.barh(y, width * 0.97, 0.8, left=x, color=color)
    ink = matplotlib.rcParams["text.color"] if color == faint() else "white"
    panel.text(x + width * 0.485, y, text, ha="center", va="center", fontsize=7.5, color=ink)


def order() -> Figure:
    """Draw which record each position of an epoch reads, by the code that training uses."""
    import grain

    from clip_jax.data.order.blocks import BlockOrder, OfPositions, Streams

    count, streams = 2_048, Streams(64 * 4)
    mixed = np.array(list(grain.MapDataset.range(count).seed(0).shuffle()))
    blocks = BlockOrder(
        np.full(64, count // 64), seed=0, shuffle_blocks=64, shares=OfPositions(streams, count)
    )
    read = np.zeros(count, int)
    for stream in range(streams.count):
        index = np.arange(count // streams.count)
        position = index // streams.width * streams.batch_size + stream * streams.width
        read[position + index % streams.width] = blocks.at(stream, 0, len(index)).record
    drawn, panels = figure(7.4, 3.1, ncols=2, sharey=True)
    titles = ("global: any record may be next", "blocks: streams read from front to back")
    colours = np.array(DEVICES)[np.arange(count) % streams.batch_size // streams.width % 4]
    for panel, records, title in zip(panels, (mixed, read), titles, strict=True):
        panel.scatter(np.arange(count), records, c=colours, s=2, linewidths=0, rasterized=True)
        panel.set(title=title, xlabel="position in the epoch", xlim=(0, count), ylim=(0, count))
    panels[0].set_ylabel("record, in the order of the files")
    return drawn


def accumulation() -> Figure:
    """Draw the timeline of one step with gradient accumulation in four chunks."""
    drawn, panel = figure(7.4, 2.3)
    for chunk in range(4):
        start = 6 + 2 * chunk
        again = f"encode again and\nbackpropagate {chunk + 1}"
        box(panel, chunk, 2, 1, f"encode\n{chunk + 1}", DEVICES[chunk])
        box(panel, start, 2, 2, again, DEVICES[chunk])
        panel.fill([start, start + 0.8, start + 1.94], [-0.4, 0.4, -0.4], color=faint())
    box(panel, 4, 1, 2, "loss of the batch\nand its gradients", "#6b7280")
    panel.set_yticks([2, 1, 0], ["towers", "objective", "stored\nactivations"])
    panel.set(xlim=(0, 14), ylim=(-0.5, 2.5), xticks=[], xlabel="time within one step")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    return drawn


def losses() -> Figure:
    """Draw which part of the similarity matrix four devices hold at once, in each form."""
    drawn, panels = figure(7.4, 2.5, ncols=3)
    titles = {
        "dense": "dense: all texts at once",
        "blocked": "blocked: the same block of texts",
        "ring": "ring: another block each",
    }
    for panel, (name, title) in zip(panels, titles.items(), strict=True):
        for device in range(4):
            held = {"dense": range(4), "blocked": [1], "ring": [(device + 1) % 4]}[name]
            for block in range(4):
                color = DEVICES[device] if block in held else faint()
                panel.barh(device, 0.94, 0.9, left=block - 0.47, color=color)
        panel.set_title(title, fontsize=9)
        panel.set(xlabel="block of texts", xticks=range(4), yticks=range(4), ylim=(3.5, -0.5))
        panel.set_xticklabels(["1", "2", "3", "4"])
        panel.set_yticklabels(
            [f"images of device {i + 1}" if panel is panels[0] else "" for i in range(4)]
        )
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    return drawn


def ring() -> Figure:
    """Draw who holds which texts at each hop, and when each block of the matrix is computed."""
    drawn, (held, matrix) = figure(7.4, 2.6, ncols=2)
    for device in range(4):
        for hop in range(4):
            block = (device + hop) % 4
            box(held, hop, device, 1, f"texts {block + 1}", DEVICES[block])
            box(matrix, block, device, 1, f"hop {hop}", DEVICES[block])
    held.set(title="texts that a device holds", xlabel="hop")
    held.set_xticks(np.arange(4) + 0.485, range(4))
    matrix.set(title="when each block of similarities is computed", xlabel="block of texts")
    matrix.set_xticks(np.arange(4) + 0.485, range(1, 5))
    held.set_yticks(range(4), [f"device {i + 1}" for i in range(4)])
    matrix.set_yticks(range(4), [f"images {i + 1}" for i in range(4)])
    for panel in (held, matrix):
        panel.set_ylim(3.5, -0.5)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    return drawn


def sharding() -> Figure:
    """Draw every parameter of a ViT-B/32 with the mesh axes of its dimensions, from the table."""
    import jax
    from jax.sharding import AbstractMesh

    from clip_jax.models.clip import CLIP, CLIPConfig
    from clip_jax.sharding import param_shardings, path_name

    config = CLIPConfig()
    params = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    shardings = param_shardings(config, params, mesh)
    colours = {"fsdp": DEVICES[0], "tensor": DEVICES[2], None: faint()}
    leaves = jax.tree_util.tree_leaves_with_path(params)
    drawn, panel = figure(7.4, 0.18 * len(leaves))
    for row, ((path, x), leaf) in enumerate(zip(leaves, jax.tree.leaves(shardings), strict=True)):
        axes = [*leaf.spec, *[None] * (x.ndim - len(leaf.spec))]
        panel.text(-0.2, row, path_name(path), ha="right", va="center", fontsize=7)
        for column, (axis, size) in enumerate(zip(axes, x.shape, strict=True)):
            parts = axis if isinstance(axis, tuple) else (axis,)
            for i, part in enumerate(parts):
                width = 0.95 / len(parts)
                panel.barh(row, width, left=column + i * width, color=colours[part])
            ink = matplotlib.rcParams["text.color"] if parts == (None,) else "white"
            panel.text(column + 0.47, row, size, ha="center", va="center", fontsize=6, color=ink)
    labels = {
        "fsdp": "sharded over fsdp",
        "tensor": "sharded over tensor",
        None: "replicated on every device",
    }
    for axis, label in labels.items():
        panel.barh(0, 0, color=colours[axis], label=label)
    panel.legend(loc="upper right")
    panel.set(xlim=(-0.1, 6), ylim=(len(leaves), -1))
    panel.axis("off")
    return drawn


def resume() -> Figure:
    """Draw what a kill costs: the steps since the newest checkpoint, done twice."""
    drawn, panel = figure(7.4, 2.6)
    panel.axhspan(20, 26, color=faint(), label="steps done twice, with the same samples")
    panel.plot([0, 26], [0, 26], color=DEVICES[0], label="first process, killed at step 26")
    panel.plot(
        [29, 43], [20, 34], color=DEVICES[1], label="restarted from the checkpoint of step 20"
    )
    ink = matplotlib.rcParams["text.color"]
    panel.scatter([0, 10, 20, 39], [0, 10, 20, 30], color=ink, s=16, zorder=3, label="checkpoint")
    panel.set(xlabel="time", ylabel="step", xticks=[], xlim=(-1, 46), ylim=(-1, 36))
    panel.legend(loc="lower right")
    return drawn


DRAWINGS: tuple[Callable[[], Figure], ...] = (order, accumulation, losses, ring, sharding, resume)


def themes() -> Iterator[str]:
    """Yield the suffix of each theme's files, while its colours are those of matplotlib."""
    from clip_jax.display import STYLE

    for suffix, (ink, back) in THEMES.items():
        edges = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
        theme = {**dict.fromkeys(edges, ink), "grid.color": back, "axes.facecolor": "none"}
        with matplotlib.rc_context({**STYLE, **theme}):
            yield suffix


def pictures() -> Iterator[tuple[str, str]]:
    """Yield the file names and SVGs of all drawings."""
    for suffix in themes():
        for draw in DRAWINGS:
            svg = io.StringIO()
            draw().savefig(svg, format="svg", metadata={"Date": None}, transparent=True)
            yield f"{draw.__name__}{suffix}.svg", svg.getvalue()
