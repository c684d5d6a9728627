"""Output for people: warnings, progress bars, and the style of all plots."""

import io
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

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
REPORTED = {  # metrics in a report's line
    "loss": "loss {:.4g}",
    "image_to_text_accuracy": "in-batch accuracy {:.1%}",
    "images_per_second": "{:,.0f} images/s",
    "mfu": "MFU {:.1%}",
}


def plain(text: str) -> str:
    """Escape dollar signs, between which matplotlib would read a formula."""
    return text.replace("$", r"\$")


def duration(seconds: float) -> str:
    """Format a time, such as 12 s, 1 min 20 s, 3 h 5 min or 2 d 4 h."""
    s = round(seconds)
    parts = {"d": s // 86_400, "h": s // 3_600 % 24, "min": s // 60 % 60, "s": s % 60}
    return " ".join([f"{count} {unit}" for unit, count in parts.items() if count][:2]) or "0 s"


def results(step: int, values: Mapping[str, float | int | str]) -> str:
    """Format the results of an evaluation, in lines that fit on a terminal."""
    shown = {name: x if isinstance(x, str) else f"{x:.4g}" for name, x in values.items()}
    text = "  ".join(f"{name}\xa0{value}" for name, value in shown.items())
    lines = textwrap.wrap(text, 90, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"step {step}  {line}".replace("\xa0", " ") for line in lines)


def table(names: Sequence[str], rows: Iterable[Iterable[object]], left: int = 1) -> str:
    """Draw a table whose first columns are aligned to the left; "" without rows."""
    drawn = Table(*names, box=box.SIMPLE_HEAD)
    for column in drawn.columns[left:]:
        column.justify = "right"
    for row in rows:
        drawn.add_row(*(f"{x:.4f}" if isinstance(x, float) else str(x) for x in row))
    stream = io.StringIO()
    Console(file=stream, width=120).print(drawn)
    return stream.getvalue().rstrip() if drawn.rows else ""


def say(line: str) -> None:
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
            from rich import progress

            self._progress = progress.Progress(
                progress.TextColumn("[bold]{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                console=self._console,
                transient=fleeting,
            )
            self._task = self._progress.add_task(work, total=total, completed=start)
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

    def report(self, step: int, values: Mapping[str, Any], seconds_left: float = 0) -> None:
        """Print the main metrics of a report and the estimated time to completion."""
        shown = []
        for metric, text in REPORTED.items():
            for name, value in values.items():
                term, _, last = name.rpartition("/")
                if last == metric:
                    shown.append(f"{term} {text.format(value)}".strip())
        if seconds_left:
            shown.append(f"ETA {duration(seconds_left)}")
        self.line(f"step {step}/{self._total}  " + "  ".join(shown))

    def line(self, text: str) -> None:
        """Print one line above the bar."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None
