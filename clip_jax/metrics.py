"""Where numbers go: `metrics.jsonl`, TensorBoard, the terminal; and the clock behind them."""

import contextlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any, TextIO

import jax
import tensorboardX
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class Clock:
    """Seconds spent by activity since the start and since the last `lap`."""

    def __init__(self) -> None:
        self.total: dict[str, float] = defaultdict(float)
        self._lap: dict[str, float] = defaultdict(float)
        self._start = self._lap_start = time.perf_counter()

    @contextlib.contextmanager
    def measure(self, name: str) -> Generator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - start
            self.total[name] += seconds
            self._lap[name] += seconds

    def elapsed(self) -> float:
        """Return seconds since the clock was made."""
        return time.perf_counter() - self._start

    def lap(self) -> tuple[float, dict[str, float]]:
        """Return the seconds since the last lap, in all and by activity, and start a new one."""
        now = time.perf_counter()
        wall, parts = now - self._lap_start, dict(self._lap)
        self._lap_start = now
        self._lap.clear()
        return wall, parts


class Writer:
    """Append to `metrics.jsonl` and TensorBoard; a resumed run first drops what it will redo."""

    def __init__(self, workdir: Path, resume_step: int) -> None:
        path = workdir / "metrics.jsonl"
        keep_until(path, resume_step)
        self._file = path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=resume_step + 1 if resume_step else None
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._board.close()


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a JSONL file past `step`, and a last line torn by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    replace_text(path, "".join(kept))


def replace_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


class Display:
    """A progress bar on a terminal, plain lines elsewhere; always on standard error."""

    def __init__(self, total: int, start: int = 0, stream: TextIO | None = None) -> None:
        stream = stream or sys.stderr
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._total = total
        self._progress = None
        if stream.isatty():
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
            )
            self._task = self._progress.add_task("train", total=total, completed=start, status="")
            self._progress.start()

    def advance(self, step: int) -> None:
        """Move the bar."""
        if self._progress:
            self._progress.update(self._task, completed=step)

    def report(self, step: int, values: dict[str, Any]) -> None:
        """Show a report's main numbers."""
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


def peak_memory() -> int | None:
    """Return the largest peak of the local devices in bytes; None where it isn't reported (CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    return max(peaks, default=None)
