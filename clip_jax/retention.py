"""Which checkpoints of a run there are, which of them RUN@20000 and RUN@best mean, and which stay.

Beside a run its watcher evaluates checkpoints (`clip-jax evaluate RUN --watch`). What both say to
each other lies in `evals/watch/` of the work directory: the watcher which step it reads, the run
which steps it is about to delete. Each writes before it looks, so one of them always notices; and
the watcher writes down what it has found before it takes its mark away.
"""

import contextlib
import datetime
import json
import os
import secrets
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from clip_jax import files, orbax_s3, processes
from clip_jax.files import Place
from clip_jax.refused import Refused
from clip_jax.workdir import LEASE_SECONDS, RENEW_SECONDS, parse, read_json, read_rows

Results = Mapping[str, float]  # of one step, by name

WATCH = "evals/watch"  # of a work directory: what its watcher needs
WATCHED = "evals/watch.jsonl"  # and what it has found


@dataclass(frozen=True, kw_only=True)
class Best:
    """By which result a checkpoint is the best."""

    name: str
    mode: Literal["max", "min"]
    of: Literal["run", "watcher"]  # who evaluates

    def value(self, results: Results) -> float:
        """Return the result such that larger is better; -inf where there is none."""
        value = results.get(self.name, float("nan"))
        if value != value:  # none, or no number
            return float("-inf")
        return value if self.mode == "max" else -value


# --------------------------------------------------------------------------------- which there are


def orbax_place(directory: epath.PathLike) -> epath.Path:
    """A folder as Orbax takes it; the first on s3:// teaches it that."""
    place = files.place(directory)
    if os.fspath(directory).startswith("s3://"):
        orbax_s3.enable()
    return epath.Path(place if files.is_remote(directory) else os.path.abspath(place))


def steps_in(directory: epath.PathLike) -> list[int]:
    """List the steps whose checkpoints are complete, the newest last."""
    found = ocp.path.step.standard_name_format().find_all(orbax_place(directory))
    return sorted(step.step for step in found)


def split_name(path: Place) -> tuple[Place, str]:
    """Split RUN@20000 and RUN@best in the run and what stands behind the last @.

    A path that exists is itself, and so is one without such a suffix.
    """
    run, at, which = os.fspath(path).rpartition("@")
    if not (at and run and (which == "best" or which.isdecimal())) or path.exists():
        return path, ""
    return files.place(run), which


def named_step(workdir: Place, which: str) -> int:
    """Return the step that stands behind the @, the newest for "". Refused where there is none."""
    steps = steps_in(workdir / "checkpoints")
    if not steps:
        raise Refused(f"{workdir / 'checkpoints'} holds no checkpoint: the run has saved none yet.")
    kept = f"{workdir} keeps the checkpoints of steps {', '.join(map(str, steps))}"
    if which == "best":
        best = _best_of(workdir)
        if best is None:
            raise Refused(
                f"{workdir}@best: the run was trained without --checkpoint.best, the name of a "
                f"result; {kept}, such as {workdir}@{steps[-1]}."
            )
        found = results_of(workdir, steps, best)
        if not any(best.name in results for results in found.values()):
            raise Refused(f"{workdir}@best: none of its checkpoints has {best.name} yet; {kept}.")
        return max(steps, key=lambda step: (best.value(found[step]), step))
    if which and int(which) not in steps:
        raise Refused(
            f"{kept}, not of {which}; name one of these, or train that run with a larger "
            "--checkpoint.keep."
        )
    return int(which) if which else steps[-1]


def _best_of(workdir: Place) -> Best | None:
    config = read_json(workdir / "config.json").get("checkpoint") or {}
    if not config.get("best"):
        return None
    return Best(name=config["best"], mode=config["best_mode"], of=config["best_of"])


def results_of(workdir: Place, steps: Sequence[int], best: Best) -> dict[int, Results]:
    """Return what is known of each of these steps: kept with it, or found by the watcher."""
    if best.of == "watcher":
        rows = {row["step"]: row for row in read_rows(workdir / WATCHED)}
        return {step: rows.get(step, {}) for step in steps}
    return {step: stored(workdir / "checkpoints", step) or {} for step in steps}


def stored(directory: Place, step: int) -> Results | None:
    """Return the results that Orbax keeps with a checkpoint; None where they are no such thing."""
    path = directory / str(step) / "metrics" / "metrics"
    return parse(path.read_bytes()) if path.exists() else {}


# --------------------------------------------------------------------------------- which are kept


@dataclass
class _Info:
    step: int
    time: datetime.datetime
    metrics: dict[str, Any] | None


class Retention(policies.PreservationPolicy):
    """Keeps the newest checkpoints, steps named, the best, and the one that a watcher is reading.

    All processes ask it at once.
    """

    def __init__(self, workdir: Place, keep: int, also: Sequence[int], best: Best | None) -> None:
        self._workdir, self._best, self._keep = workdir, best, keep
        kept = [policies.LatestN(keep), policies.CustomSteps(also)]
        if best:
            kept.append(
                policies.BestN(
                    get_metric_fn=best.value, n=1, keep_checkpoints_without_metrics=False
                )
            )
        self._policy = policies.AnyPreservationPolicy(kept)
        self._seen: dict[str, tuple[bytes, float]] = {}  # marks of readers, and since when

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [x.step for x in checkpoints]
        is_watched = processes.is_lead() and (self._workdir / WATCH).exists()
        held: list[int] = []
        if is_watched:  # whose mark is gone has written what it found: so the marks come first
            self._announce(steps[: -self._keep])
            held = self._marked()
        results: Mapping[int, Results] = {x.step: x.metrics or {} for x in checkpoints}
        if self._best and self._best.of == "watcher":
            known = results_of(self._workdir, steps, self._best) if processes.is_lead() else {}
            results = {int(step): x for step, x in processes.gather(known)[0].items()}
        name = self._best.name if self._best else ""
        infos = [
            _Info(x.step, x.time, dict(results[x.step]) if name in results[x.step] else None)
            for x in checkpoints
        ]
        keep = self._policy.should_preserve(infos, context=context)
        held = processes.gather(held)[0]
        keep = [kept or step in held for step, kept in zip(steps, keep, strict=True)]
        if is_watched:
            self._announce([step for step, kept in zip(steps, keep, strict=True) if not kept])
        return keep

    def _announce(self, steps: Sequence[int]) -> None:
        """Tell the watcher what is about to be deleted."""
        path = self._workdir / WATCH / "deleting"
        files.write_whole(path, json.dumps({"steps": list(steps)}))

    def _marked(self) -> list[int]:
        """List the steps that a watcher reads, unless its mark has stood still for too long."""
        held, now = [], time.monotonic()
        for path in files.walk(self._workdir / WATCH / "reading"):
            with contextlib.suppress(FileNotFoundError):
                mark = files.read(path)
                before, since = self._seen.get(path, (b"", now))
                self._seen[path] = mark, since if mark == before else now
                if now > self._seen[path][1] + LEASE_SECONDS:
                    files.remove(path)
                elif (parsed := parse(mark)) and "step" in parsed:
                    held.append(parsed["step"])
        return held


@contextlib.contextmanager
def reading(workdir: Place, step: int, *, over: bool) -> Generator[bool]:
    """Keep the run from deleting a step; the context says whether it is there, and stays.

    A run that is `over` deletes nothing any more. A thread renews the mark, which counts as long
    as it changes.
    """
    folder = workdir / WATCH
    path, left = folder / "reading" / secrets.token_hex(8), threading.Event()

    def renew() -> None:
        beats = 1
        while not left.wait(RENEW_SECONDS):
            beats += 1
            with contextlib.suppress(OSError, Refused):  # out of reach: the next try will tell
                files.write_whole(path, json.dumps({"step": step, "beats": beats}))

    files.write_whole(path, json.dumps({"step": step, "beats": 1}))
    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        doomed = () if over else read_json(folder / "deleting").get("steps", ())
        yield step not in doomed and step in steps_in(workdir / "checkpoints")  # in this order
    finally:
        left.set()
        thread.join()
        with contextlib.suppress(OSError, Refused):
            files.remove(path)
