"""Which checkpoints a run saves; find them, and resolve RUN@20000 and RUN@best.

A watcher of the run (`clip-jax evaluate RUN --watch`) writes a row to `evals/watch.jsonl` for
every step it has finished. The run keeps the oldest steps that have no row yet.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from etils import epath

from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.errors import InputError, check_ranges
from clip_jax.serialize import from_dict
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import content_of, parse, read_rows

Results = Mapping[str, Any]  # of one step, by name

WATCH = "evals/watch"  # in a run directory: the folder that its watcher claims
TEACHER = "teacher"  # in RUN@teacher and RUN@20000:teacher
_NAMED = re.compile(rf"best|\d+|{TEACHER}|(best|\d+):{TEACHER}")  # behind the @
WATCHED = "evals/watch.jsonl"  # a row for every step that the watcher has finished


class Unusable(InputError):
    """A checkpoint that does not exist, is damaged, or has values that are not finite."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save checkpoints, and which ones to keep."""

    every_steps: int = 1_000  # Number of steps between checkpoints; the last step is always saved.
    keep: int = 3  # Number of newest checkpoints to keep; training can resume from any of them.
    # Number of checkpoints kept for `clip-jax evaluate RUN --watch`, if one runs: the oldest that
    # it has not evaluated yet.
    keep_unwatched: int = 4
    also: tuple[int, ...] = ()  # Further steps to save and keep, such as starts of branches.
    # Name of a result, such as imagenet1k/acc1, whose best checkpoint is kept as well. A step that
    # sets a new best is saved at once. None: keep no best checkpoint.
    best: str | None = None
    # Whether the highest (max) or the lowest (min) result is best.
    best_mode: Literal["max", "min"] = "max"
    # Source of the results: the run's own evaluators, or `clip-jax evaluate RUN --watch` (watcher).
    best_of: Literal["run", "watcher"] = "run"

    def __post_init__(self) -> None:
        at_least_one = dict.fromkeys(("every_steps", "keep", "keep_unwatched", "also"), "[1, inf)")
        check_ranges(self, "checkpoint.", **at_least_one)
        if self.best is not None and not self.best.strip():
            raise InputError("checkpoint.best is empty; set it to the name of a result, or None.")

    def value(self, results: Results) -> float:
        """Return the result `best`, signed so that larger is better; -inf if none is finite."""
        value = results.get(self.best or "", math.nan)
        if not math.isfinite(value):
            return -math.inf
        return value if self.best_mode == "max" else -value

    def has_value(self, results: Results) -> bool:
        """Return whether the result `best` exists and is finite: others are never the best."""
        return self.value(results) > -math.inf


def orbax_path(directory: epath.PathLike) -> epath.Path:
    """Return a folder as a path for Orbax; the first one on s3:// enables that in Orbax."""
    path = files.as_path(directory)
    if os.fspath(directory).startswith("s3://"):
        from clip_jax.checkpoints import orbax

        orbax.enable()
    return epath.Path(path if files.is_remote(directory) else os.path.abspath(path))


def steps_in(directory: epath.PathLike) -> list[int]:
    """List the steps whose checkpoints are complete, the newest last."""
    import orbax.checkpoint as ocp  # 0.2 s, which commands without a run save

    names = ocp.path.step.standard_name_format().find_all(orbax_path(directory))
    return sorted(step.step for step in names)


def split_name(path: AnyPath) -> tuple[AnyPath, str]:
    """Split RUN@20000 and RUN@best into the run and the part after the last @.

    RUN@teacher and RUN@20000:teacher name the weights that a run's self-supervised losses average.
    A path that exists, or has no such suffix, is returned unchanged, with an empty part.
    """
    run, at, which = os.fspath(path).rpartition("@")
    if not (at and run and _NAMED.fullmatch(which)) or path.exists():
        return path, ""
    return files.as_path(run), which


def of_teacher(which: str) -> tuple[str, bool]:
    """Split the part after the @ into that of the step, and whether it names the teacher."""
    return which.removesuffix(TEACHER).removesuffix(":"), which.endswith(TEACHER)


def named_step(workdir: AnyPath, which: str) -> int:
    """Return the step that the part after the @ names, the newest for ""; Unusable if missing."""
    which, _ = of_teacher(which)
    steps = steps_in(workdir / "checkpoints")
    if not steps:
        raise Unusable(
            f"{workdir / 'checkpoints'} has no checkpoint; wait until the run has saved one."
        )
    available = f"{workdir} has checkpoints of steps {', '.join(map(str, steps))}"
    if which == "best":
        config = from_dict(CheckpointConfig, read_run_config(workdir).get("checkpoint", {}))
        if not config.best:
            raise InputError(
                f"{workdir}@best: the run was trained without --checkpoint.best; use {workdir}@"
                f"{steps[-1]}, for example ({available})."
            )
        if config.best_of == "watcher":
            rows = {row["step"]: row for row in read_rows(workdir / WATCHED)}
        else:
            rows = {step: stored(workdir / "checkpoints", step) or {} for step in steps}
        if not any(config.has_value(rows.get(step, {})) for step in steps):
            raise InputError(
                f"{workdir}@best: none of its checkpoints has a finite {config.best} yet; "
                f"{available}."
            )
        return max(steps, key=lambda step: (config.value(rows.get(step, {})), step))
    if which and int(which) not in steps:
        raise Unusable(
            f"{available}, not of {which}; choose one of these, or train that run with a larger "
            "--checkpoint.keep."
        )
    return int(which) if which else steps[-1]


def stored(directory: AnyPath, step: int) -> Results | None:
    """Return the results that Orbax saved with a checkpoint; {} if none, None if unreadable."""
    path = directory / str(step) / "metrics" / "metrics"
    return parse(content_of(path)) if path.exists() else {}
