"""Draw images with predictions."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, UInt8

from clip_jax.display import plain
from clip_jax.storage.files import AnyPath, write_whole

TILE = 1.42  # width of an image on a sheet in inches; 1.5 with the gap
PAIRS = 4  # images beside their attention maps in a row of a sheet
LINE = 19  # bold letters that fit below an image
LEGEND = 12  # classes named below a segmentation, those with the most pixels


def save(figure: Any, path: AnyPath, **options: Any) -> None:
    """Write a figure to disk or a bucket, in the format of the path's suffix; without one, PNG."""
    kind = path.suffix[1:] or "png"
    write_whole(path, lambda file: figure.savefig(file, format=kind, **options))


def contact_sheet(
    path: AnyPath,
    images: Sequence[UInt8[np.ndarray, "H W C"]],
    lines: Sequence[Sequence[str]],
    *,
    right: Sequence[bool] | None = None,
    columns: int = 8,
    title: str = "",
) -> None:
    """Draw images in a grid, each above its lines of text; long lines are shortened in the middle.

    With `right` the first line is the answer: bold, green where it is right, red where it is wrong.
    """
    from matplotlib.figure import Figure

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    space = 0.1 + 0.2 * max(map(len, lines))  # for the texts, which automatic layout would squeeze
    top = 0.4 if title else 0.1
    width, height = 1.5 * columns, (TILE + space) * rows + top
    figure = Figure((width, height), dpi=100)
    figure.suptitle(plain(title), fontsize=10)
    grid = {
        "left": 0,
        "right": 1 - 0.08 / width,
        "wspace": 0.08 / TILE,
        "bottom": space / height,
        "top": 1 - top / height,
        "hspace": space / TILE,
    }
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid))
    for axis in axes:
        axis.axis("off")
    for i, (axis, image, text) in enumerate(zip(axes, images, lines, strict=False)):
        axis.imshow(image, interpolation="nearest")
        for j, line in enumerate(text):
            if len(line) > LINE:
                line = f"{line[: LINE // 2 - 1]}…{line[-LINE // 2 :]}"
            color = "black"
            if j == 0 and right is not None:
                color = "#1a7f37" if right[i] else "tab:red"
            axis.text(
                0.5,
                -0.04 - 0.14 * j,
                plain(line),
                transform=axis.transAxes,
                ha="center",
                va="top",
                fontsize=8,
                color=color,
                fontweight="normal" if color == "black" else "bold",
            )
    save(figure, path, bbox_inches="tight")  # texts are outside the axes


def attention_sheet(
    path: AnyPath,
    images: Sequence[UInt8[np.ndarray, "_H _W C"]],
    maps: Sequence[Float[np.ndarray, "_h _w"]],
    lines: Sequence[str],
) -> None:
    """Draw each image beside its attention map, which covers it, and a line of text below both.

    Each map has its own scale, from its least to its most attended patch.
    """
    from matplotlib.figure import Figure

    columns = min(PAIRS, len(images))
    rows = -(-len(images) // columns)
    figure = Figure((3 * columns, (TILE + 0.35) * rows), dpi=100, layout="constrained")
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axis in axes:
        axis.axis("off")
    for axis, image, shares, line in zip(axes, images, maps, lines, strict=False):
        height, width = (side / max(image.shape[:2]) for side in image.shape[:2])
        vertical = (0.5 - height / 2, 0.5 + height / 2)
        left, right = (1 - width, 1), (1.05, 1.05 + width)
        axis.imshow(image, extent=(*left, *vertical), interpolation="nearest")
        axis.imshow(image.mean(-1), extent=(*right, *vertical), cmap="gray", vmin=0, vmax=255)
        over = {"extent": (*right, *vertical), "alpha": 0.7, "interpolation": "bicubic"}
        axis.imshow(shares, cmap="inferno", **over)
        axis.set(xlim=(0, 2.05), ylim=(0, 1))
        axis.set_title(plain(line), y=0, pad=-13, fontsize=9)
    save(figure, path)


def segments_sheet(
    path: AnyPath,
    image: UInt8[np.ndarray, "H W C"],
    predicted: Int[np.ndarray, "H W"],
    truth: Int[np.ndarray, "H W"],
    names: Sequence[str],
) -> None:
    """Draw an image, its predicted and its true classes (black where negative), and a legend."""
    from matplotlib.colors import hsv_to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    number = np.arange(len(names))
    # Hues of neighbours differ by the golden ratio of the circle, so that all are far apart.
    hues = np.stack([number * 0.618 % 1, 0.9 - number % 3 * 0.2, 0.95 - number % 2 * 0.3], axis=1)
    colors = np.concatenate([hsv_to_rgb(hues), np.zeros((1, 3))])  # −1 is the last
    height, width = image.shape[:2]
    figure = Figure((9, 3.3 * height / width + 0.9), dpi=100, layout="constrained")
    for axis, drawn, title in zip(
        figure.subplots(1, 3),
        (image, colors[predicted], colors[truth]),
        ("image", "predicted", "true"),
        strict=True,
    ):
        axis.imshow(drawn, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.axis("off")
    both = np.concatenate([predicted[truth >= 0], truth[truth >= 0]])
    present = np.argsort(-np.bincount(both, minlength=len(names)), kind="stable")[:LEGEND]
    patches = [Patch(color=colors[i], label=plain(names[i])) for i in present if (both == i).any()]
    if patches:
        figure.legend(handles=patches, loc="outside lower center", ncols=6, fontsize=8)
    save(figure, path)


def with_probabilities(
    logits: Float[np.ndarray, " classes"], names: Sequence[str], top: int = 3
) -> list[str]:
    """Format the nearest names with their softmax over all names, the best first."""
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities)[:top]
    return [f"{names[i]}  {probabilities[i]:.0%}" for i in best]
