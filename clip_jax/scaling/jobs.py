"""Run processes, a limited number at a time."""

import contextlib
import fcntl
import signal
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from clip_jax.clock import CLOCK, Clock

Say = Callable[[str], None]

POLL_SECONDS = 0.1


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived, and the running processes have been terminated."""


class Job(NamedTuple):
    """One process, and the directory that it locks while it runs."""

    name: str
    command: list[str]
    directory: Path  # has `log.txt`, the process's output, and `job.lock`, which it holds
    is_done: Callable[[], bool]  # whether its result exists
    after: str = ""  # name of the job that produces its input, if there is one
    is_ready: Callable[[], bool] = lambda: True  # whether its input exists


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    began: float


def run(
    jobs: Sequence[Job],
    at_a_time: int,
    environment: Mapping[str, str],
    say: Say,
    clock: Clock = CLOCK,
) -> dict[str, str]:
    """Run all jobs, in order; the failure of one does not affect the others.

    Returns the reasons of failures, by name. After SIGTERM or SIGINT, sends SIGTERM to the running
    processes and raises Stopped when they have ended. Call it from the main thread, since only
    that one handles signals.
    """
    waiting, running, failures = list(jobs), list[_Running](), dict[str, str]()
    terminated = False
    with _listening() as came:
        while running or (waiting and not came):
            for job in [job for job in waiting if job.after in failures and not job.is_ready()]:
                waiting.remove(job)
                failures[job.name] = f"not started, because {job.after} failed"
            while len(running) < at_a_time and not came:
                unfinished = {job.name for job in (*waiting, *(one.job for one in running))}
                if not (started := _start_next(waiting, unfinished, environment, say, clock)):
                    break
                running.append(started)
            for one in [*running]:
                if one.process.poll() is None:
                    if came and not terminated:
                        one.process.terminate()
                    continue
                running.remove(one)
                job, minutes = one.job, f"{(clock.now() - one.began) / 60:.1f} min"
                if failure := _failure(job, one.process.returncode):
                    say(f"{job.name}: {'stopped' if came else 'FAILED'} after {minutes}: {failure}")
                    failures |= {} if came else {job.name: failure}
                else:
                    say(f"{job.name}: done after {minutes}; {len(waiting) + len(running)} left")
            terminated = bool(came)
            clock.sleep(POLL_SECONDS)
    if came:
        raise Stopped(
            f"stopped by {signal.Signals(came[0]).name}; running jobs were saved. Run the same "
            "command again to continue."
        )
    return failures


def _start_next(
    waiting: list[Job],
    unfinished: set[str],
    environment: Mapping[str, str],
    say: Say,
    clock: Clock,
) -> _Running | None:
    """Start the first waiting job whose directory is free, and take it off the list."""
    for job in list(waiting):
        if job.after in unfinished and not job.is_ready():
            continue
        with (job.directory / "job.lock").open("a") as lock:
            try:
                # The process inherits the lock and holds it while it lives, even if this one is
                # killed: so the next command does not train in parallel to an orphan.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            waiting.remove(job)
            if job.is_done():
                say(f"{job.name}: already done by another process")
                continue
            with (job.directory / "log.txt").open("ab") as log:
                # A terminal's Ctrl-C does not reach a process group of its own: the process gets
                # SIGTERM instead, on which it saves.
                process = subprocess.Popen(
                    job.command, env=environment, pass_fds=[lock.fileno()], process_group=0,
                    stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                )  # fmt: skip
        return _Running(job, process, clock.now())
    return None


def _failure(job: Job, code: int) -> str | None:
    if code == 0 and job.is_done():
        return None
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    text = (job.directory / "log.txt").read_text(errors="replace").strip()
    return f"{how}; {job.directory / 'log.txt'} ends: {text.splitlines()[-1] if text else ''}"


@contextlib.contextmanager
def _listening() -> Generator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of being ended by them."""
    came: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, lambda number, _: came.append(number)) for kind in kinds]
    try:
        yield came
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
