"""A queue of jobs that workers on any machines share through files in the study's folder.

`queue/events` is a log of numbered files. Of several processes, one can create a number, so all
workers agree on who claimed which job, in what order. A worker rewrites `queue/workers/ID` every
few seconds: its claims hold while that changes. On its own machine they hold while a process has
the job's lock. If several hosts do each job together, the first claims it once the others have
written that they are free, and these follow its claims.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from clip_jax.checkpoints.claim import LEASE_SECONDS, RENEW_SECONDS
from clip_jax.clock import CLOCK, Clock
from clip_jax.processes import Position
from clip_jax.storage import files
from clip_jax.storage.errors import Unreachable
from clip_jax.storage.events import Event, Events, read
from clip_jax.storage.files import AnyPath

Say = Callable[[str], None]
Afford = Callable[[Collection[str]], bool]  # whether jobs and all that were done before fit a limit

EVENTS = "queue/events"  # folder of the log in that of the study
SCAN_SECONDS = 1.0  # between looks for a job that can start


def workers(root: AnyPath, now: float) -> dict[str, str]:
    """Describe the worker of each claimed job, by name; `now` is the time in Unix seconds."""
    words = {}
    for name, event in Events(f"{root}/{EVENTS}").newest.items():
        if event["kind"] == "claim" and event["subject"] == name:
            quiet = now - (read(f"{root}/queue/workers/{event['worker']}") or event)["unix"]
            silence = f", silent for {quiet / 60:.0f} min" if quiet > LEASE_SECONDS else ""
            words[name] = f"process {event['pid']} on {event['host']}{silence}"
    return words


class Job(NamedTuple):
    """One process, and the directories that it uses."""

    name: str
    command: list[str]
    workdir: AnyPath  # gets the result, and a copy of the log
    log: Path  # on disk; beside it is the lock that the process holds while it runs
    is_done: Callable[[], bool]  # whether its result exists
    after: str = ""  # name of the job that produces its input, if there is one
    is_ready: Callable[[], bool] = lambda: True  # whether its input exists
    held: IO[bytes] | None = None  # the lock, if this process has it
    cpus: frozenset[int] = frozenset()  # that its process may use; none: all

    def lock(self) -> "Job | None":
        """Lock the job on this machine until its process ends; None if another process has it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        file = self.log.with_suffix(".lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            # A cluster file system may have no locks.
            return self if error.errno in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK) else None
        return self._replace(held=file)

    def unlock(self) -> None:
        if self.held:
            self.held.close()


class Queue(contextlib.AbstractContextManager):
    """A worker's view of the queue: it claims the first job that is free, or follows its group."""

    def __init__(
        self,
        root: AnyPath,
        jobs: Sequence[Job],
        afford: Afford,
        group: Position,
        say: Say,
        clock: Clock = CLOCK,
    ) -> None:
        self._root = root
        self._afford = afford
        self._group = group
        self._say = say
        self._clock = clock
        self._reported = ""  # the last line that was printed
        self.failures: dict[str, str] = {}  # reasons, by name
        self.left_out: list[str] = []  # names of jobs that would exceed the limit
        self._waiting = list(jobs)
        self._held: dict[str, str] = {}  # workers who claimed, by name of the job
        self._log = Events(f"{root}/{EVENTS}")
        self._signs = f"{root}/queue/workers"
        self._first = self._log.length  # jobs that failed before are tried again
        self._pulses: dict[str, tuple[Any, float]] = {}  # of others' claims, and since when
        self._worker = secrets.token_hex(6)
        self._me = {"worker": self._worker, "host": socket.gethostname(), "pid": os.getpid()}
        self._next_scan = 0.0
        self._next_beat = 0.0
        self._hosts = () if group.index else range(2, group.count + 1)  # that follow this one
        self._order = 0  # number of the event of the first host that this one has obeyed
        # Events that are not yet written.
        self._due = [self._event("start", group=group.name)] if self._hosts else []
        self._beat()

    def take(self) -> Job | None:
        if self._clock.now() < self._next_scan:
            return None
        # Requests to a bucket cost money.
        pause = SCAN_SECONDS * (5 if files.is_remote(self._root) else 1)
        self._next_scan = self._clock.now() + pause
        try:
            if self._due:  # or a stop that is written late would end the next claim of that job
                self._beat()
            self._log.refresh()
            return self._follow() if self._group.index else self._choose()
        except (OSError, Unreachable) as error:
            return self._report(f"{self._root} is out of reach and tried again: {error}")

    def release(self, job: Job, outcome: str, reason: str = "") -> str:
        del self._held[job.name]
        self._next_scan = 0.0
        if self._group.index:
            self._answer()
            return ""
        self._write(outcome, subject=job.name, reason=reason)
        if outcome == "failed":
            self.failures[job.name] = reason
        elif outcome == "stopped":
            self._waiting.insert(0, job)
        return f"; {len(self._waiting) + len(self._held)} left"

    def lost(self) -> set[str]:
        if self._clock.now() >= self._next_beat:
            with contextlib.suppress(OSError, Unreachable):  # tried again at the next one
                self._beat()
        newest = self._log.newest
        return {name for name, owner in self._held.items() if newest[name]["worker"] != owner}

    def is_over(self) -> bool:
        return not (self._waiting or self._absent())

    def __exit__(self, *_: object) -> None:
        """Write the last events, dismiss the group, and remove this worker's sign of life."""
        if self._hosts:
            self._write("over", group=self._group.name)
        self._beat()
        files.remove(f"{self._signs}/{self._worker}")

    def _report(self, line: str) -> None:
        """Print a line, unless it was the last one."""
        if line != self._reported:
            self._say(line)
        self._reported = line

    def _choose(self) -> Job | None:
        """Claim the first job that can start."""
        if absent := self._absent():
            return self._report(f"waiting for host {absent} of {self._group.count}")
        for job in list(self._waiting):
            running = {other.name for other in self._waiting} | self._held.keys()
            if job.after not in {*running, *self.failures, *self.left_out} or job.is_ready():
                if locked := self._claim(job):
                    self._next_scan = 0.0
                    return locked
            elif job.after in self.failures:
                self._drop(job, f"not started, because {job.after} failed")
            elif job.after in self.left_out:
                self._leave_out(job)
        if self._waiting and not self._held:
            self._report("waiting, since other workers have the runs that are left")
        return None

    def _claim(self, job: Job) -> Job | None:
        """Lock and claim a job; None if another process has it or was faster, or it is over."""
        if not (locked := job.lock()):
            return None
        with contextlib.ExitStack() as stack:
            stack.callback(locked.unlock)
            event = self._event("claim", subject=job.name, group=self._group.name)
            if self._is_over(locked) or not self._log.append(event):
                return None
            stack.pop_all()
        self._drop(job)
        self._held[job.name] = self._worker
        return locked

    def _is_over(self, job: Job) -> bool:
        """Return whether a job has failed, is done, claimed or too expensive, as of now."""
        self._log.refresh()
        event = self._log.newest.get(job.name, {"kind": "", "number": 0})
        if event["kind"] == "failed" and event["number"] > self._first:
            self._drop(job, f"{event['reason']} (on {event['host']})")
        elif event["kind"] == "claim" and self._is_alive(event, job):
            return True
        elif job.is_done():
            self._drop(job)
            self._say(f"{job.name}: already done by another process")
        elif not self._afford([*self._log.newest, job.name]):
            self._leave_out(job)
        else:
            return False
        return True

    def _is_alive(self, claim: Event, job: Job) -> bool:
        """Return whether another worker's claim holds, though this process has the job's lock."""
        if claim["host"] == self._me["host"] and job.held:
            return False  # the lock was free, so both the worker and its job have ended
        # A run in a bucket renews a lease, also if its worker was killed and it was not.
        lease = max(files.walk(f"{job.workdir}/lease"), default="")
        pulse = (read(f"{self._signs}/{claim['worker']}"), lease)
        before, since = self._pulses.get(claim["id"], (None, 0.0))
        since = since if pulse == before else self._clock.now()
        self._pulses[claim["id"]] = (pulse, since)
        return self._clock.now() < since + LEASE_SECONDS

    def _drop(self, job: Job, failure: str = "") -> None:
        self._waiting = [other for other in self._waiting if other.name != job.name]
        if failure:
            self.failures[job.name] = failure

    def _leave_out(self, job: Job) -> None:
        self._drop(job)
        self.left_out.append(job.name)
        self._say(f"{job.name}: left out, since it would exceed the limit")

    def _absent(self) -> str:
        """List the numbers, from 1, of the hosts that are not yet free for the next job."""
        newest = self._log.newest
        name = self._group.name
        free = {host: newest.get(f"{name} host {host}", {}).get("order") for host in self._hosts}
        return ", ".join(str(x) for x in self._hosts if free[x] != newest[name]["number"])

    def _follow(self) -> Job | None:
        """Lock the job that the first host has claimed, but after a restart only the next one."""
        order = self._log.newest.get(self._group.name)
        if not order or order["number"] == self._order:
            return None
        if self._order and order["kind"] == "claim":
            job = next(job for job in self._waiting if job.name == order["subject"])
            if locked := job.lock():  # else an earlier process is just ending
                self._order = order["number"]
                self._held[job.name] = order["worker"]
            return locked
        if self._order and order["kind"] == "over":
            self._waiting = []
        self._order = order["number"]
        self._answer()
        return None

    def _answer(self) -> None:
        """Write that this host is free again after what it has obeyed."""
        host = f"{self._group.name} host {self._group.index + 1}"
        self._write("free", group=host, order=self._order)

    def _event(self, kind: str, **more: Any) -> Event:
        return {"kind": kind, **self._me, "unix": self._clock.unix(), **more}

    def _write(self, kind: str, **more: Any) -> None:
        """Add an event to the log, later if that is out of reach."""
        self._due.append(self._event(kind, **more))
        self._next_beat = 0.0
        self.lost()

    def _beat(self) -> None:
        """Show that this worker lives, and write the events that are due."""
        self._next_beat = self._clock.now() + RENEW_SECONDS
        sign = self._me | {"unix": self._clock.unix(), "beat": self._clock.now()}
        files.write_whole(f"{self._signs}/{self._worker}", json.dumps(sign))
        self._log.refresh()
        while self._due:
            newest = self._log.newest.get(self._due[0].get("subject"), self._me)
            if newest["worker"] != self._worker or self._log.append(self._due[0]):
                self._due.pop(0)
            elif not self._log.refresh():
                break
