"""How every plot of this project looks."""

from typing import Any

STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "svg.fonttype": "none",  # text stays text, in the paper's own font
    "svg.hashsalt": "clip_jax",  # the same picture is the same file
}


def plain(text: str) -> str:
    """Escape a text for matplotlib, which else reads formulas between dollars."""
    return text.replace("$", r"\$")
