"""Which checkpoints of a run there are, which of them RUN@20000 and RUN@best mean, and which stay.

A watcher beside the run (`clip-jax evaluate RUN --watch`) writes a row to `evals/watch.jsonl` for
every step it has finished with. The run keeps the oldest steps that have no row yet.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from clip_jax import processes
from clip_jax.checkpoints import orbax
from clip_jax.checkpoints.run_config import read_run_config
from clip_jax.errors import InputError, check_ranges
from clip_jax.serialize import from_dict
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import parse, read_rows

Results = Mapping[str, Any]  # of one step, by name

WATCH = "evals/watch"  # of a work directory: the folder that its watcher claims
WATCHED = "evals/watch.jsonl"  # and a row for every step that the watcher has finished with


class Unusable(InputError):
    """A checkpoint that is not kept, is damaged, or holds values that are no numbers."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and how much to keep."""

    every_steps: int = 1_000  # steps between checkpoints; the last step is always saved
    keep: int = 3  # newest checkpoints kept, all of which a run can go on from
    # Checkpoints kept for `clip-jax evaluate RUN --watch`, where a run has such a watcher: the
    # oldest that it has not finished with.
    keep_unwatched: int = 4
    also: tuple[int, ...] = ()  # steps that are saved and kept besides: where branches begin
    # Name of a result, such as imagenet1k/acc1: the checkpoint with the best is kept besides. A
    # step whose evaluation gives the best so far is saved, whenever it is.
    best: str | None = None
    best_mode: Literal["max", "min"] = "max"  # which result is the best: the highest or the lowest
    # Whose results: of the run's own evaluators, or of `clip-jax evaluate RUN --watch` beside it.
    best_of: Literal["run", "watcher"] = "run"

    def __post_init__(self) -> None:
        at_least_one = dict.fromkeys(("every_steps", "keep", "keep_unwatched", "also"), "[1, inf)")
        check_ranges(self, "checkpoint.", **at_least_one)
        if self.best is not None and not self.best.strip():
            raise InputError("checkpoint.best is empty; give the name of a result, or None.")

    def value(self, results: Results) -> float:
        """Return the result `best` such that larger is better; -inf where there is none."""
        value = results.get(self.best or "", float("nan"))
        if value != value:  # none, or no number
            return float("-inf")
        return value if self.best_mode == "max" else -value


# --------------------------------------------------------------------------------- which there are


def orbax_path(directory: epath.PathLike) -> epath.Path:
    """A folder as Orbax takes it; the first on s3:// teaches it that."""
    path = files.as_path(directory)
    if os.fspath(directory).startswith("s3://"):
        orbax.enable()
    return epath.Path(path if files.is_remote(directory) else os.path.abspath(path))


def steps_in(directory: epath.PathLike) -> list[int]:
    """List the steps whose checkpoints are complete, the newest last."""
    names = ocp.path.step.standard_name_format().find_all(orbax_path(directory))
    return sorted(step.step for step in names)


def split_name(path: AnyPath) -> tuple[AnyPath, str]:
    """Split RUN@20000 and RUN@best in the run and what stands behind the last @.

    A path that exists is itself, and so is one without such a suffix.
    """
    run, at, which = os.fspath(path).rpartition("@")
    if not (at and run and (which == "best" or which.isdecimal())) or path.exists():
        return path, ""
    return files.as_path(run), which


def named_step(workdir: AnyPath, which: str) -> int:
    """Return the step that stands behind the @, the newest for "". Unusable if there is none."""
    steps = steps_in(workdir / "checkpoints")
    if not steps:
        raise Unusable(
            f"{workdir / 'checkpoints'} holds no checkpoint: the run has saved none yet."
        )
    kept = f"{workdir} keeps the checkpoints of steps {', '.join(map(str, steps))}"
    if which == "best":
        config = from_dict(CheckpointConfig, read_run_config(workdir).get("checkpoint", {}))
        if not config.best:
            raise InputError(
                f"{workdir}@best: the run was trained without --checkpoint.best, the name of a "
                f"result; {kept}, such as {workdir}@{steps[-1]}."
            )
        if config.best_of == "watcher":
            rows = {row["step"]: row for row in read_rows(workdir / WATCHED)}
        else:
            rows = {step: stored(workdir / "checkpoints", step) or {} for step in steps}
        if not any(config.best in rows.get(step, {}) for step in steps):
            raise InputError(
                f"{workdir}@best: none of its checkpoints has {config.best} yet; {kept}."
            )
        return max(steps, key=lambda step: (config.value(rows.get(step, {})), step))
    if which and int(which) not in steps:
        raise Unusable(
            f"{kept}, not of {which}; name one of these, or train that run with a larger "
            "--checkpoint.keep."
        )
    return int(which) if which else steps[-1]


def stored(directory: AnyPath, step: int) -> Results | None:
    """Return the results that Orbax keeps with a checkpoint; None where they are no such thing."""
    path = directory / str(step) / "metrics" / "metrics"
    return parse(path.read_bytes()) if path.exists() else {}


# --------------------------------------------------------------------------------- which are kept


class Retention(policies.PreservationPolicy):
    """Keeps the newest checkpoints, the steps named, the best, and those a watcher has yet to read.

    All processes ask it at once.
    """

    def __init__(self, workdir: AnyPath, config: CheckpointConfig) -> None:
        self._workdir, self._config = workdir, config
        kept = [policies.LatestN(config.keep), policies.CustomSteps(config.also)]
        if config.best:
            kept.append(
                policies.BestN(
                    get_metric_fn=config.value, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._policy = policies.AnyPreservationPolicy(kept)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [x.step for x in checkpoints]
        unwatched, rows = processes.gather(self._look(steps) if processes.is_lead() else None)[0]
        results: Sequence[Results] = [x.metrics or {} for x in checkpoints]
        if self._config.best_of == "watcher":
            results = rows
        infos: list[Any] = [
            SimpleNamespace(
                step=x.step, time=x.time, metrics=dict(row) if self._config.best in row else None
            )
            for x, row in zip(checkpoints, results, strict=True)
        ]
        keep = self._policy.should_preserve(infos, context=context)
        return [kept or step in unwatched for step, kept in zip(steps, keep, strict=True)]

    def _look(self, steps: Sequence[int]) -> tuple[list[int], list[Results]]:
        """List the oldest steps that a watcher has yet to finish with, and its rows of all.

        Both are of one reading: so a step is among the former, or its row counts for the best.
        """
        rows = {row["step"]: row for row in read_rows(self._workdir / WATCHED)}
        unwatched = [step for step in sorted(steps) if step not in rows][
            : self._config.keep_unwatched
        ]
        is_watched = (self._workdir / WATCH).exists()
        return unwatched if is_watched else [], [rows.get(step, {}) for step in steps]
