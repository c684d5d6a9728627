"""Processes, a few at a time, each on its own share of this machine's cores."""

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from clip_jax.clock import CLOCK, Clock

Say = Callable[[str], None]

POLL_SECONDS = 0.1


class Stopped(Exception):
    """SIGTERM or Ctrl-C came; what was running has been told, and has ended."""


class Job(NamedTuple):
    """One process, and the directory that no other process of its kind may use meanwhile."""

    name: str
    command: list[str]
    directory: Path  # of `log.txt`, what the process prints, and of `job.lock`, which it holds
    is_done: Callable[[], bool]  # whether the work is there
    weight: float  # how long it takes beside the others
    after: str = ""  # the job that makes what it begins with, if one does
    is_ready: Callable[[], bool] = lambda: True  # whether that is there; its maker may go on


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
    """Run all jobs, in order; one that fails leaves the others alone.

    Returns why jobs failed, by name. Raises Stopped after SIGTERM or SIGINT, once the running
    processes, which get SIGTERM, have ended. Call it from the main thread, which hears signals.
    """
    waiting, running, failures = list(jobs), dict[int, _Running](), dict[str, str]()
    shares, terminated, began = _shares(at_a_time), False, clock.now()
    with _listening() as came:
        while running or (waiting and not came):
            for job in [job for job in waiting if job.after in failures and not job.is_ready()]:
                waiting.remove(job)
                failures[job.name] = f"not begun, for {job.after} failed"
            for slot, cores in enumerate(shares):
                if slot not in running and not came:
                    unfinished = {
                        one.name for one in (*waiting, *(x.job for x in running.values()))
                    }
                    started = _start_next(waiting, unfinished, cores, environment, say, clock)
                    running |= {slot: started} if started else {}
            for slot, (job, process, start) in list(running.items()):
                if process.poll() is None:
                    if came and not terminated:
                        process.terminate()
                    continue
                del running[slot]
                minutes = f"{(clock.now() - start) / 60:.1f} min"
                if failure := _failure(job, process.returncode):
                    say(f"{job.name}: {'stopped' if came else 'FAILED'} after {minutes}: {failure}")
                    failures |= {} if came else {job.name: failure}
                else:
                    left = _left(jobs, waiting, running, clock.now() - began)
                    say(f"{job.name}: {minutes}{left}")
            terminated = bool(came)
            clock.sleep(POLL_SECONDS)
    if came:
        raise Stopped(
            f"stopped by {signal.Signals(came[0]).name}; what was running is saved. The same "
            "command again goes on."
        )
    return failures


def _start_next(
    waiting: list[Job],
    unfinished: set[str],
    cores: set[int],
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
                # The process inherits the lock: it holds as long as that lives, even if we are
                # killed, so that whoever comes next does not train beside an orphan.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            waiting.remove(job)
            if job.is_done():
                say(f"{job.name}: another process did it")
                continue
            with _on(cores), (job.directory / "log.txt").open("ab") as log:
                process = subprocess.Popen(
                    job.command, env=environment, pass_fds=[lock.fileno()],
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


def _left(
    jobs: Sequence[Job], waiting: Sequence[Job], running: Mapping[int, _Running], seconds: float
) -> str:
    """Say how many jobs are left, and how long they take if the weights are right."""
    left = [*waiting, *(other.job for other in running.values())]
    to_do, total = (sum(job.weight for job in some) for some in (left, jobs))
    if not left or to_do >= total:
        return ""
    minutes = seconds / 60 * to_do / (total - to_do)
    return f"; {len(left)} of {len(jobs)} left, about {minutes:.0f} min"


def _shares(at_a_time: int) -> list[set[int]]:
    """Divide the cores that this process may use; more jobs than cores share them in turn."""
    if not hasattr(os, "sched_getaffinity"):  # macOS pins nothing
        return [set() for _ in range(at_a_time)]
    cores, n = sorted(os.sched_getaffinity(0)), at_a_time
    if n > len(cores):
        return [{cores[i % len(cores)]} for i in range(n)]
    return [set(cores[len(cores) * i // n : len(cores) * (i + 1) // n]) for i in range(n)]


@contextlib.contextmanager
def _on(cores: set[int]) -> Generator[None]:
    """Let what is started inside inherit these cores alone, and no terminal's Ctrl-C.

    Ctrl-C reaches every process of a terminal: the runs must hear of it from us, as SIGTERM, at
    which they save. We hear of one that comes meanwhile afterwards.
    """
    ours = os.sched_getaffinity(0) if cores else None
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if ours:
            os.sched_setaffinity(0, cores)
        yield
    finally:
        if ours:
            os.sched_setaffinity(0, ours)
        signal.signal(signal.SIGINT, heard)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextlib.contextmanager
def _listening() -> Generator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of dying of them."""
    came: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, lambda number, _: came.append(number)) for kind in kinds]
    try:
        yield came
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)
