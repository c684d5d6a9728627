"""Run processes, a limited number at a time."""

import contextlib
import errno
import fcntl
import signal
import subprocess
from collections.abc import Callable, Collection, Generator, Mapping
from pathlib import Path
from typing import IO, NamedTuple, Protocol, runtime_checkable

from clip_jax.clock import CLOCK, Clock
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

Say = Callable[[str], None]

POLL_SECONDS = 0.1


class Stopped(Exception):
    """SIGTERM or Ctrl-C arrived, and the running processes have been terminated."""


class Job(NamedTuple):
    """One process, and the directories that it uses."""

    name: str
    command: list[str]
    workdir: AnyPath  # gets the result, and a copy of the log
    directory: Path  # on disk: has the log, and the lock that the process holds while it runs
    is_done: Callable[[], bool]  # whether its result exists
    after: str = ""  # name of the job that produces its input, if there is one
    is_ready: Callable[[], bool] = lambda: True  # whether its input exists
    process: int = 0  # number of this process, if several hosts do the job together
    held: IO[bytes] | None = None  # the lock, if this process has it

    @property
    def log(self) -> Path:
        return self.directory / (f"log-{self.process}.txt" if self.process else "log.txt")

    def lock(self) -> "Job | None":
        """Lock the job on this machine; None if another process has the lock.

        The job's process inherits the lock and holds it while it lives, even if this one is killed:
        so the next command does not start the job beside an orphan. Without a lock, if the file
        system has none.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        name = f"job-{self.process}.lock" if self.process else "job.lock"
        file = (self.directory / name).open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            return self if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK) else None
        return self._replace(held=file)

    def unlock(self) -> None:
        if self.held:
            self.held.close()


@runtime_checkable
class Source(Protocol):
    """Where a runner's jobs come from."""

    def take(self) -> Job | None: ...  # locks and claims a job that can start now, if there is one
    def release(self, job: Job, outcome: str, reason: str = "") -> str: ...  # returns what is left
    def lost(self) -> Collection[str]: ...  # names of own jobs that others have taken over
    def is_over(self) -> bool: ...  # whether no job will come any more


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    began: float


def run(
    source: Source, at_a_time: int, environment: Mapping[str, str], say: Say, clock: Clock = CLOCK
) -> None:
    """Run all jobs of a source; the failure of one does not affect the others.

    After SIGTERM or SIGINT, sends SIGTERM to the running processes and raises Stopped when they
    have ended. Call it from the main thread, since only that one handles signals.
    """
    running = list[_Running]()
    terminated = False
    with _listening() as came, contextlib.ExitStack() as locks:
        while running or not (came or source.is_over()):
            while len(running) < at_a_time and not came and (job := source.take()):
                locks.callback(job.unlock)
                running.append(_start(job, environment, clock))
                say(f"{job.name}: started as process {running[-1].process.pid}")
            lost = source.lost()
            for one in [*running]:
                job = one.job
                if one.process.poll() is None:
                    if job.name in lost:
                        one.process.kill()
                    elif came and not terminated:
                        one.process.terminate()
                    continue
                running.remove(one)
                failure = _failure(job, one.process.returncode)
                if files.is_remote(job.workdir):
                    files.write_whole(job.workdir / job.log.name, job.log.read_bytes())
                ended = "stopped" if came or job.name in lost else "failed"
                outcome = ended if failure else "done"
                rest = source.release(job, outcome, failure or "")
                job.unlock()
                how = outcome.replace("failed", "FAILED")
                minutes = f"{(clock.now() - one.began) / 60:.1f} min"
                say(f"{job.name}: {how} after {minutes}{f': {failure}' if failure else rest}")
            terminated = bool(came)
            clock.sleep(POLL_SECONDS)
    if came:
        raise Stopped(
            f"stopped by {signal.Signals(came[0]).name}; running jobs were saved. Run the same "
            "command again to continue."
        )


def _start(job: Job, environment: Mapping[str, str], clock: Clock) -> _Running:
    with job.log.open("ab") as log:
        # A terminal's Ctrl-C does not reach a process group of its own: the process gets SIGTERM
        # instead, on which it saves.
        process = subprocess.Popen(
            job.command, env=environment, pass_fds=[job.held.fileno()] if job.held else [],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0,
        )  # fmt: skip
    return _Running(job, process, clock.now())


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
