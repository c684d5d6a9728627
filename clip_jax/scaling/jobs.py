"""Run the processes of a queue, a limited number at a time."""

import contextlib
import itertools
import os
import signal
import subprocess
from collections.abc import Generator, Mapping

from clip_jax.clock import CLOCK, Clock
from clip_jax.scaling.queue import Job, Queue, Say
from clip_jax.storage import files

POLL_SECONDS = 0.1


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived, and the running processes have been terminated."""


def run(
    queue: Queue, at_a_time: int, environment: Mapping[str, str], say: Say, clock: Clock = CLOCK
) -> None:
    """Run the jobs that a queue gives; the failure of one does not affect the others.

    Each gets an equal share of the CPUs, so that threads of one do not interrupt those of another.
    After SIGTERM or SIGINT, sends SIGTERM to the running processes and raises Stopped when they
    have ended. Call it from the main thread, since only that one handles signals.
    """
    running = list[tuple[Job, subprocess.Popen, float]]()
    shares = _shares(at_a_time)
    terminated = False
    with _listening() as came, contextlib.ExitStack() as locks:
        while running or not (came or queue.is_over()):
            while len(running) < at_a_time and not came and (job := queue.take()):
                locks.callback(job.unlock)
                with job.log.open("ab") as log:
                    # A terminal's Ctrl-C does not reach a process group of its own: the process
                    # gets SIGTERM instead, on which it saves.
                    process = subprocess.Popen(
                        job.command,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        process_group=0,
                        pass_fds=[job.held.fileno()] if job.held else [],
                    )
                if shares:
                    job = job._replace(cpus=shares.pop(0))
                    with contextlib.suppress(ProcessLookupError):  # it has ended already
                        os.sched_setaffinity(process.pid, job.cpus)
                running.append((job, process, clock.now()))
                say(f"{job.name}: started as process {process.pid}")
            lost = queue.lost()
            for entry in [*running]:
                job, process, began = entry
                if process.poll() is None:
                    if job.name in lost:
                        process.kill()
                    elif came and not terminated:
                        process.terminate()
                    continue
                running.remove(entry)
                shares += [job.cpus] if job.cpus else []
                failure = _failure(job, process.returncode)
                if files.is_remote(job.workdir):
                    files.write_whole(job.workdir / job.log.name, job.log.read_bytes())
                ended = "stopped" if came or job.name in lost else "failed"
                outcome = ended if failure else "done"
                rest = queue.release(job, outcome, failure or "")
                job.unlock()
                how = outcome.replace("failed", "FAILED")
                minutes = f"{(clock.now() - began) / 60:.1f} min"
                say(f"{job.name}: {how} after {minutes}{f': {failure}' if failure else rest}")
            terminated = bool(came)
            clock.sleep(POLL_SECONDS)
    if came:
        raise Stopped(
            f"stopped by {signal.Signals(came[0]).name}; running jobs were saved. Run the same "
            "command again to continue."
        )


def _shares(count: int) -> list[frozenset[int]]:
    """Divide this process's CPUs into shares; none for fewer CPUs than shares, or by the system."""
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if not 1 < count <= len(cpus):
        return []
    edges = [len(cpus) * i // count for i in range(count + 1)]
    return [frozenset(cpus[first:last]) for first, last in itertools.pairwise(edges)]


def _failure(job: Job, code: int) -> str | None:
    if code == 0 and job.is_done():
        return None
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    text = job.log.read_text(errors="replace").strip()
    return f"{how}; {job.log} ends: {text.splitlines()[-1] if text else ''}"


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
