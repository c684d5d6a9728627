"""Output for people: warnings, progress bars, and the style of all plots."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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
    """Escape dollar signs, between which matplotlib would read a formula."""
    return text.replace("$", r"\$")


def warn(line: str) -> None:
    """Print a message to standard error, outside of any progress bar."""
    print(f"clip-jax: {line}", file=sys.stderr, flush=True)


class Display:
    """A progress bar on a terminal, plain lines elsewhere; always on standard error.

    Threads may share it. `fleeting` bars vanish when they end.
    """

    def __init__(
        self, work: str, total: int, start: int = 0, *, quiet: bool = False, fleeting: bool = False
    ) -> None:
        # Left to itself, rich writes HTML outputs under Jupyter, whatever the stream.
        self._console = Console(
            file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True, force_jupyter=False
        )
        self._total = total
        self._progress = None
        if sys.stderr.isatty() and not quiet:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
                transient=fleeting,
            )
            self._task = self._progress.add_task(work, total=total, completed=start, status="")
            self._progress.start()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def advance(self, done: int) -> None:
        """Set the bar to `done` items."""
        if self._progress:
            self._progress.update(self._task, completed=done)

    def add(self, count: int = 1) -> None:
        """Advance the bar by `count` items."""
        if self._progress:
            self._progress.advance(self._task, count)

    def report(self, step: int, values: Mapping[str, Any]) -> None:
        """Show the main metrics of a report."""
        names = ("loss", "image_to_text_accuracy", "logit_scale", "images_per_second", "mfu")
        shown = [f"{name} {values[name]:.4g}" for name in names if name in values]
        if self._progress:
            self._progress.update(self._task, status="  ".join(shown))
        else:
            self.line(f"step {step}/{self._total}  " + "  ".join(shown))

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
