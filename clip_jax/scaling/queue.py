"""A queue of jobs that workers on any machines share through files in the study's folder.

`queue/events` is a log of numbered files. Of several processes, one can create a number, so all
workers agree on who claimed which job, in what order. A worker rewrites `queue/workers/ID` every
few seconds: its claims hold while that changes. On its own machine they hold while a process has
the job's lock. If several hosts do each job together, the first is the worker, and announces jobs
in `queue/groups/NAME/1`; the others answer in files of their own once they are free.
"""

import contextlib
import json
import os
import secrets
import socket
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from clip_jax.checkpoints.claim import LEASE_SECONDS, RENEW_SECONDS
from clip_jax.clock import CLOCK, Clock
from clip_jax.scaling.jobs import Job, Say
from clip_jax.storage import files
from clip_jax.storage.errors import Unreachable
from clip_jax.storage.events import Event, Events, read
from clip_jax.storage.files import AnyPath

SCAN_SECONDS = 1.0  # between looks for a job that can start


def log_of(root: AnyPath) -> Events:
    """Read the log of a study: which worker claimed, finished, failed or stopped which job."""
    return Events(f"{root}/queue/events")


def workers(root: AnyPath, now: float) -> dict[str, str]:
    """Describe the worker of each claimed job, by name; `now` is the time in Unix seconds."""
    words = {}
    for name, event in log_of(root).newest.items():
        if event["kind"] == "claim":
            quiet = now - (read(f"{root}/queue/workers/{event['worker']}") or event)["unix"]
            silence = f", silent for {quiet / 60:.0f} min" if quiet > LEASE_SECONDS else ""
            words[name] = f"process {event['pid']} on {event['host']}{silence}"
    return words


class Budget(NamedTuple):
    """What the jobs of a study may cost together."""

    costs: Mapping[str, float] = {}  # of every job of the study, by name
    done: Collection[str] = ()  # names of jobs that were done before
    limit: float = float("inf")

    def allows(self, begun: Iterable[str], name: str) -> bool:
        """Return whether all jobs that are done or begun and this one stay within the limit."""
        cost = sum(self.costs.get(x, 0.0) for x in {*self.done, *begun, name})
        return cost <= self.limit * (1 + 1e-9)  # sums have rounding errors


# ------------------------------------------------------------------ hosts that do jobs together


@dataclass
class Group:
    """The hosts that do each job together, as this one, number `index` of `count`, sees them."""

    folder: str = ""
    index: int = 0
    count: int = 1
    token: str = ""  # of the job that the first host has announced last

    def announce(self, job: str) -> None:
        """Name the next job, as the first host; "" before the first and after the last."""
        before, self.token = self.token, secrets.token_hex(6)
        self.write(after=before, job=job)

    def write(self, **content: str) -> None:
        """Write what this host has announced, or if it is not the first, that it has done that."""
        if self.count > 1:
            text = json.dumps({"token": self.token, **content})
            files.write_whole(f"{self.folder}/{self.index + 1}", text)

    def read(self, index: int) -> dict[str, str]:
        """Read what the host with this index has written."""
        return {"token": "", **(read(f"{self.folder}/{index + 1}") or {})}

    def absent(self) -> str:
        """List the numbers, from 1, of the hosts that have not yet done the announced job."""
        others = (i for i in range(1, self.count) if self.read(i)["token"] != self.token)
        return ", ".join(str(i + 1) for i in others)


class Follower:
    """Another host than the first of a group: it starts the jobs that the first announces.

    A host that was restarted joins at the next job: it has not done what was announced before.
    """

    def __init__(self, jobs: Sequence[Job], group: Group, clock: Clock = CLOCK) -> None:
        self._jobs, self._group, self._clock = {job.name: job for job in jobs}, group, clock
        self._next_scan, self._over = 0.0, False

    def take(self) -> Job | None:
        if self._clock.now() < self._next_scan:
            return None
        self._next_scan = self._clock.now() + SCAN_SECONDS
        order = self._group.read(0)
        if order["token"] == self._group.token:
            return None
        joined = self._group.token != "" and order.get("after") == self._group.token
        if joined and order["job"]:
            if job := self._jobs[order["job"]].lock():  # else an earlier process is just ending
                self._group.token = order["token"]
            return job
        self._over, self._group.token = joined, order["token"]
        self._group.write()
        return None

    def release(self, job: Job, outcome: str, reason: str = "") -> str:
        self._group.write()
        return ""

    def lost(self) -> Collection[str]:
        return ()

    def is_over(self) -> bool:
        return self._over


# ------------------------------------------------------------------ the queue


class Queue(contextlib.AbstractContextManager):
    """A worker's view of the queue: it claims the first of its jobs that is free and ready."""

    def __init__(
        self, root: AnyPath, jobs: Sequence[Job], budget: Budget, group: Group, say: Say,
        clock: Clock = CLOCK,
    ) -> None:  # fmt: skip
        self._root, self._budget, self._group = root, budget, group
        self._say, self._clock, self._reported = say, clock, ""
        self.failures: dict[str, str] = {}  # reasons, by name
        self.left_out: list[str] = []  # names of jobs that would exceed the limit
        self._waiting, self._held = list(jobs), dict[str, Job]()
        self._log, self._ended = log_of(root), list[Event]()  # events that are not yet written
        self._first = self._log.length  # jobs that failed before are tried again
        self._pulses: dict[str, tuple[Any, float]] = {}  # of others' claims, and since when
        self._worker = secrets.token_hex(6)
        self._me = {"worker": self._worker, "host": socket.gethostname(), "pid": os.getpid()}
        self._next_scan = self._next_beat = 0.0
        self._beat()
        group.announce("")
        self._absent = group.absent()  # hosts that are not yet free

    def take(self) -> Job | None:
        if self._clock.now() < self._next_scan:
            return None
        # Requests to a bucket cost money.
        pause = SCAN_SECONDS * (5 if files.is_remote(self._root) else 1)
        self._next_scan = self._clock.now() + pause
        try:
            if self._absent and (absent := self._group.absent()):
                return self._report(f"waiting for host {absent} of {self._group.count}")
            self._absent = ""
            for job in list(self._waiting):
                if self._can_start(job) and (locked := self._claim(job)):
                    self._next_scan, self._absent = 0.0, self._group.absent()
                    return locked
            if self._waiting and not self._held:
                self._report("waiting, since other workers have the runs that are left")
        except (OSError, Unreachable) as error:
            self._report(f"{self._root} is out of reach and tried again: {error}")
        return None

    def release(self, job: Job, outcome: str, reason: str = "") -> str:
        del self._held[job.name]
        self._ended.append(self._event(outcome, job.name) | {"reason": reason})
        if outcome == "failed":
            self.failures[job.name] = reason
        elif outcome == "stopped":
            self._waiting.insert(0, job)
        self._next_scan = self._next_beat = 0.0
        self.lost()
        return f"; {len(self._waiting) + len(self._held)} left"

    def lost(self) -> set[str]:
        if self._clock.now() >= self._next_beat:
            with contextlib.suppress(OSError, Unreachable):  # tried again at the next one
                self._beat()
        newest = self._log.newest
        return {name for name in self._held if newest[name]["worker"] != self._worker}

    def is_over(self) -> bool:
        return not self._waiting and not self._absent

    def __exit__(self, *_: object) -> None:
        """Write the last events, remove this worker's sign of life, and dismiss other hosts."""
        self._beat()
        files.remove(self._sign(self._worker))
        self._group.announce("")

    def _report(self, line: str) -> None:
        """Print a line, unless it was the last one."""
        if line != self._reported:
            self._say(line)
        self._reported = line

    def _sign(self, worker: str) -> str:
        return f"{self._root}/queue/workers/{worker}"

    def _can_start(self, job: Job) -> bool:
        """Return whether a job's input exists; drop the job if that will never come."""
        others = {other.name for other in self._waiting} | self._held.keys()
        if job.after not in {*others, *self.failures, *self.left_out} or job.is_ready():
            return True
        if job.after in self.failures:
            self._drop(job, f"not started, because {job.after} failed")
        elif job.after in self.left_out:
            self._leave_out(job)
        return False

    def _claim(self, job: Job) -> Job | None:
        """Lock and claim a job; None if another process has it, or it is over."""
        if not (locked := job.lock()):
            return None
        with contextlib.ExitStack() as stack:
            stack.callback(locked.unlock)
            while not self._is_over(locked):
                if self._log.append(self._event("claim", job.name)):
                    self._group.announce(job.name)
                    stack.pop_all()
                    self._drop(job)
                    self._held[job.name] = locked
                    return locked
                if not self._log.refresh():
                    break
        return None

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
        elif not self._budget.allows(self._log.newest, job.name):
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
        pulse = (read(self._sign(claim["worker"])), lease)
        before, since = self._pulses.get(claim["id"], (None, 0.0))
        if pulse != before:
            since = self._clock.now()
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

    def _event(self, kind: str, name: str) -> Event:
        return {"kind": kind, "subject": name, **self._me, "unix": self._clock.unix()}

    def _beat(self) -> None:
        """Show that this worker lives, and write the events that are due."""
        self._next_beat = self._clock.now() + RENEW_SECONDS
        sign = self._me | {"unix": self._clock.unix(), "beat": self._clock.now()}
        files.write_whole(self._sign(self._worker), json.dumps(sign))
        self._log.refresh()
        while self._ended:
            newest = self._log.newest[self._ended[0]["subject"]]
            if newest["worker"] != self._worker or self._log.append(self._ended[0]):
                self._ended.pop(0)
            elif not self._log.refresh():
                break
