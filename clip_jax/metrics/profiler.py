"""Trace some steps of a run."""

import tempfile
from pathlib import Path
from typing import Any

import jax
from etils import epath

from clip_jax.errors import InputError
from clip_jax.storage import files


class Profiler:
    """Trace the steps `first:last` for xprof and TensorBoard, into `<workdir>/profile`."""

    def __init__(self, steps: str | None, workdir: epath.Path) -> None:
        self._first, self._last = profile_range(steps) if steps else (0, 0)
        self._target = workdir / "profile"
        self._scratch: tempfile.TemporaryDirectory | None = None

    def before(self, step: int) -> None:
        """Start the trace at the first step of the range, or where the run resumes within it."""
        if self._scratch is None and self._first <= step <= self._last:
            self._scratch = tempfile.TemporaryDirectory()
            jax.profiler.start_trace(self._scratch.name)

    def after(self, step: int, outputs: Any) -> bool:
        """Stop after the last step of the range, once it is computed; return True if so."""
        if self._scratch is None or step < self._last:
            return False
        jax.block_until_ready(outputs)
        self.close()
        self._first = self._last = 0
        return True

    def close(self) -> None:
        """Stop a trace that has begun, and write it."""
        if self._scratch:
            jax.profiler.stop_trace()
            files.copy_tree(Path(self._scratch.name), self._target)
            self._scratch.cleanup()
            self._scratch = None


def profile_range(steps: str) -> tuple[int, int]:
    """Parse `10:15` into the first and the last step. Raises InputError if it is malformed."""
    first, _, last = steps.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise InputError(
            f"profile_steps={steps!r} must be FIRST:LAST with 1 <= FIRST <= LAST, such as 10:15."
        )
    return int(first), int(last)
