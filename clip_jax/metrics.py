"""Where numbers go: `metrics.jsonl`, TensorBoard, the terminal; and the clock behind them."""

import contextlib
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import jax
import tensorboardX
from etils import epath
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_UPLOAD_SECONDS = 60  # between rewritings of a file in a store that cannot append


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


class Goodput:
    """Where the seconds of a run went, over all its starts: what was not spent on steps, and why.

    `compile` holds the first step too. `lost` are steps done again, since a run that died goes on
    from its last checkpoint; the time between two starts is in nobody's clock.
    """

    PARTS = ("init", "restore", "compile", "input", "save", "evaluation")

    def __init__(self, clock: Clock, earlier: Mapping[str, Any], steps_kept: float) -> None:
        """`earlier` is the result.json of the starts before, `steps_kept` the `seconds/steps` that
        they had spent when they saved the checkpoint from which this start goes on."""
        self._clock = clock
        names = (*self.PARTS, "steps", "lost")
        self._earlier = {name: float(earlier.get(f"seconds/{name}", 0.0)) for name in names}
        lost = max(self._earlier["steps"] - steps_kept, 0.0)
        self._earlier["steps"] -= lost
        self._earlier["lost"] += lost

    def values(self) -> dict[str, float]:
        """Return seconds by part, their sum, and the share of steps in it."""
        own = {name: self._clock.total[name] for name in self.PARTS}
        own["steps"] = max(self._clock.elapsed() - sum(own.values()), 0.0)
        seconds = {name: own.get(name, 0.0) + value for name, value in self._earlier.items()}
        total = sum(seconds.values())
        return {f"seconds/{name}": value for name, value in seconds.items()} | {
            "seconds/total": total,
            "goodput": seconds["steps"] / total,
        }

    def describe(self) -> str:
        """One line for people."""
        values = self.values()
        parts = [
            f"{name} {values[f'seconds/{name}']:.1f}" for name in (*self.PARTS, "steps", "lost")
        ]
        return f"goodput {values['goodput']:.1%}; seconds: {', '.join(parts)}"


class Lines:
    """A JSONL file that grows by rows with a `step`; a resumed run first drops what it will redo.

    A bucket has no appends: there the rows are kept in memory, and the file is written anew when
    `flush` says so or once a minute.
    """

    def __init__(self, path: epath.Path, resume_step: int) -> None:
        self._path, self._appends = path, is_local(path)
        self.rows = rows_until(path, resume_step)  # those kept
        self._lines = [json.dumps(row) + "\n" for row in self.rows]
        self._written = time.monotonic()
        if path.exists():
            replace_text(path, "".join(self._lines))
        if self._appends:
            self._lines = []

    def write(self, *rows: dict[str, Any]) -> None:
        lines = [json.dumps(row) + "\n" for row in rows]
        if self._appends:
            with self._path.open("a") as file:
                file.writelines(lines)
            return
        self._lines += lines
        if time.monotonic() > self._written + _UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """See that everything is in the file."""
        if self._lines:
            replace_text(self._path, "".join(self._lines))
        self._written = time.monotonic()


class Writer:
    """Write `metrics.jsonl` and TensorBoard; a resumed run first drops what it will redo."""

    def __init__(self, workdir: epath.Path, resume_step: int) -> None:
        self._lines = Lines(workdir / "metrics.jsonl", resume_step)
        self.kept = self._lines.rows
        self._target = workdir / "tensorboard"
        self._scratch = None if is_local(workdir) else tempfile.TemporaryDirectory()
        self._board = tensorboardX.SummaryWriter(
            self._scratch.name if self._scratch else str(self._target),
            purge_step=resume_step + 1 if resume_step else None,
        )

    def write(self, step: int, values: dict[str, Any]) -> None:
        self._lines.write({"step": step, **values})
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """See that everything is in the work directory."""
        self._lines.flush()
        self._board.flush()
        if self._scratch:
            copy_tree(Path(self._scratch.name), self._target)

    def close(self) -> None:
        self._board.close()
        self.flush()
        if self._scratch:
            self._scratch.cleanup()


def is_local(path: epath.PathLike) -> bool:
    """Say whether a path is a file system's, rather than a bucket's."""
    return "://" not in os.fspath(path)


def rows_until(path: epath.Path, step: int) -> list[dict[str, Any]]:
    """Return a JSONL file's rows up to `step`, without a last line torn by a kill."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if row["step"] <= step:
                kept.append(row)
    return kept


def replace_text(path: Path | epath.Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part."""
    if not is_local(path):  # an object of a bucket appears whole
        path.write_text(text)
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def copy_tree(source: Path, target: epath.Path) -> None:
    """Copy a folder's files to a work directory that may be in a bucket."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            copy = target / path.relative_to(source).as_posix()
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


class Profiler:
    """Trace the steps `first:last` for xprof and TensorBoard, into `<workdir>/profile`."""

    def __init__(self, steps: str | None, workdir: epath.Path) -> None:
        self._first, self._last = profile_range(steps) if steps else (0, 0)
        self._target = workdir / "profile"
        self._scratch: tempfile.TemporaryDirectory | None = None

    def before(self, step: int) -> None:
        """Begin with the first step of the range, or with a later one where a run resumes."""
        if self._scratch is None and self._first <= step <= self._last:
            self._scratch = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._scratch.name)

    def after(self, step: int, outputs: Any) -> bool:
        """End with the last step, once it is computed; True if that was now."""
        if self._scratch is None or step < self._last:
            return False
        jax.block_until_ready(outputs)
        self.close()
        self._first = self._last = 0
        return True

    def close(self) -> None:
        """Write a trace that has begun."""
        if self._scratch:
            jax.profiler.stop_trace()
            copy_tree(Path(self._scratch.name), self._target)
            self._scratch.cleanup()
            self._scratch = None


def profile_range(steps: str) -> tuple[int, int]:
    """Read `10:15`: the first and the last step. ValueError says what is wrong."""
    first, _, last = steps.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(f"profile_steps={steps!r} must be FIRST:LAST with 1 <= FIRST <= LAST.")
    return int(first), int(last)


class Display:
    """A progress bar on a terminal, plain lines elsewhere; always on standard error."""

    def __init__(self, total: int, start: int = 0, quiet: bool = False) -> None:
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
