"""Pictures that let a person see what the model sees and says."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8


def contact_sheet(
    path: Path,
    images: Sequence[UInt8[np.ndarray, "H W C"]],
    lines: Sequence[Sequence[str]],
    *,
    right: Sequence[bool] | None = None,
    columns: int = 8,
    title: str = "",
) -> None:
    """Draw images in a grid, each above its lines of text; a wrong one's first line is red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = 1.35 + 0.16 * max(map(len, lines))
    figure = Figure(figsize=(1.5 * columns, height * rows + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    axes = np.ravel(figure.subplots(rows, columns, squeeze=False))
    for axis in axes:
        axis.axis("off")
    for i, (axis, image, text) in enumerate(zip(axes, images, lines, strict=False)):
        axis.imshow(image, interpolation="nearest")
        for j, line in enumerate(text):
            wrong = j == 0 and right is not None and not right[i]
            axis.text(
                0.5, -0.04 - 0.14 * j, line, transform=axis.transAxes, ha="center", va="top",
                fontsize=7, color="tab:red" if wrong else "black",
                fontweight="bold" if j == 0 else "normal",
            )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight")  # texts stand outside the axes


def with_probabilities(
    logits: Float[np.ndarray, " classes"], names: Sequence[str], top: int = 3
) -> list[str]:
    """Write the most probable names with their softmax probabilities, the best first."""
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    best = np.argsort(-probabilities)[:top]
    return [f"{names[i]}  {probabilities[i]:.0%}" for i in best]
