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
from clip_jax.errors import InputError, read_worker
from clip_jax.scaling.jobs import Job, Say, Source
from clip_jax.storage import files
from clip_jax.storage.errors import Unreachable
from clip_jax.storage.files import AnyPath
from clip_jax.storage.json_files import parse

SCAN_SECONDS = 1.0  # between looks for a job that can start
Event = dict[str, Any]  # number, kind (claim, done, failed, stopped), job, worker, host, pid, unix


def _read(path: str) -> dict[str, Any] | None:
    try:
        return parse(files.read(path)) or {}  # {} if it is damaged
    except FileNotFoundError:
        return None


class Log:
    """The events of a study's jobs, in the order that all workers see."""

    def __init__(self, root: AnyPath) -> None:
        self._folder, self.length = f"{root}/queue/events", 0
        self.newest: dict[str, Event] = {}  # the last event of each job that was ever claimed
        self.refresh()

    def refresh(self) -> bool:
        """Read the new events; return whether there were any."""
        before = self.length
        while (event := _read(self._path())) is not None:
            self._add(event)
        return self.length > before

    def append(self, event: Event) -> bool:
        """Add an event; False if another process has added one since `refresh`."""
        event = {**event, "number": self.length + 1, "id": secrets.token_hex(8)}
        made = files.create(self._path(), json.dumps(event).encode())
        # A creation whose response was lost was repeated, and met itself.
        if made := made or (_read(self._path()) or {}).get("id") == event["id"]:
            self._add(event)
        return made

    def _add(self, event: Event) -> None:
        self.length += 1
        if "job" in event:
            self.newest[event["job"]] = event

    def _path(self) -> str:
        return f"{self._folder}/{self.length + 1:08d}"


def workers(root: AnyPath, now: float) -> dict[str, str]:
    """Describe the worker of each claimed job, by name; `now` is the time in Unix seconds."""
    words = {}
    for name, event in Log(root).newest.items():
        if event["kind"] == "claim":
            quiet = now - (_read(f"{root}/queue/workers/{event['worker']}") or event)["unix"]
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

    name: str = ""
    index: int = 0
    count: int = 1
    current: tuple[str, int] = ("", 0)  # session of the first host, and number of the job

    def announce(self, root: AnyPath, job: str) -> None:
        """Name the next job, as the first host; "" before the first and after the last."""
        session, number = self.current
        self.current = (session or secrets.token_hex(6), number + 1)
        self.write(root, job)

    def write(self, root: AnyPath, job: str = "") -> None:
        """Write which job this host does, or if it is not the first, that it is free again."""
        if self.count > 1:
            content = json.dumps({"current": self.current, "job": job})
            files.write_whole(f"{root}/queue/groups/{self.name}/{self.index + 1}", content)

    def read(self, root: AnyPath, index: int) -> tuple[tuple[str, int], str]:
        """Read what the host with this index has written: its `current`, and the job."""
        content = _read(f"{root}/queue/groups/{self.name}/{index + 1}") or {}
        session, number = content.get("current", ("", 0))
        return (session, number), content.get("job", "")

    def absent(self, root: AnyPath) -> list[int]:
        """Return the numbers, from 1, of the hosts that have not yet done the current job."""
        return [i + 1 for i in range(1, self.count) if self.read(root, i)[0] != self.current]


def group_of(name: str, host: str, environment: Mapping[str, str] = os.environ) -> Group:
    """Return this host's group: from `host` (such as 1/4) and `name`, or from the environment.

    The environment is that from which JAX finds a run's processes: see `processes.start`.
    """
    if host:
        if not name:
            raise InputError(f"host={host!r} needs the name of its group: add --group NAME.")
        return Group(name, *read_worker(host, "host"))
    tpus = environment.get("TPU_WORKER_HOSTNAMES", "").split(",")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", "1")
    for kind, index, count in (
        (
            "CLIP_JAX_COORDINATOR",
            "CLIP_JAX_PROCESS_INDEX",
            environment.get("CLIP_JAX_PROCESS_COUNT"),
        ),
        ("SLURM_JOB_ID", "SLURM_PROCID", tasks),
        ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", len(tpus)),
    ):
        if {kind, index} <= environment.keys() and int(count or 1) > 1:
            name = name or environment[kind].partition(",")[0].replace("/", "-")
            return Group(name, int(environment[index]), int(count or 1))
    return Group()


class Follower(Source):
    """Another host than the first of a group: it starts the jobs that the first announces.

    A host that was restarted joins at the next job, as the first host's session and number show.
    """

    def __init__(
        self, root: AnyPath, jobs: Sequence[Job], group: Group, clock: Clock = CLOCK
    ) -> None:
        super().__init__()
        self._root, self._group, self._clock = root, group, clock
        self._jobs = {job.name: job for job in jobs}
        self._next_scan, self._over = 0.0, False

    def take(self) -> Job | None:
        if self._clock.now() < self._next_scan:
            return None
        self._next_scan = self._clock.now() + SCAN_SECONDS
        (session, number), name = self._group.read(self._root, 0)
        joined = (session, number - 1) == self._group.current
        if not session or (session, number) == self._group.current:
            return None
        if joined and name:
            if job := self._jobs[name].lock():  # else an earlier process, which is ending, has it
                self._group.current = (session, number)
            return job
        self._over, self._group.current = joined, (session, number)
        self._group.write(self._root)
        return None

    def release(self, job: Job, outcome: str, reason: str = "") -> str:
        self._group.write(self._root)
        return ""

    def is_over(self) -> bool:
        return self._over


# ------------------------------------------------------------------ the queue


class Queue(Source):
    """A worker's view of the queue: it claims the first of its jobs that is free and ready."""

    def __init__(
        self, root: AnyPath, jobs: Sequence[Job], budget: Budget, group: Group, say: Say,
        clock: Clock = CLOCK,
    ) -> None:  # fmt: skip
        super().__init__()
        self._root, self._say, self._clock = root, say, clock
        self._budget, self._group = budget, group
        self._waiting, self._held = list(jobs), dict[str, Job]()
        self._log, self._ended = Log(root), list[Event]()  # events that are not yet written
        self._first = self._log.length  # jobs that failed before are tried again
        self._pulses: dict[str, tuple[Any, float]] = {}  # of others' claims, and since when
        self._me = {
            "worker": secrets.token_hex(6),
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._sign = f"{root}/queue/workers/{self._me['worker']}"
        self._next_scan = self._next_beat = 0.0
        self._reported = ""
        self._group.announce(root, "")
        self._beat()

    def take(self) -> Job | None:
        if self._clock.now() < self._next_scan or self._is_waiting_for_hosts():
            return None
        with contextlib.suppress(OSError, Unreachable):  # tried again
            for job in list(self._waiting):
                if self._can_start(job) and (locked := job.lock()):
                    with contextlib.ExitStack() as stack:
                        stack.callback(locked.unlock)
                        if self._claim(locked):
                            self._group.announce(self._root, job.name)
                            stack.pop_all()
                            self._drop(job)
                            self._held[job.name] = locked
                            return locked
        # Requests to a bucket cost money.
        pause = SCAN_SECONDS * (5 if files.is_remote(self._root) else 1)
        self._next_scan = self._clock.now() + pause
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
        mine = self._me["worker"]
        return {name for name in self._held if self._log.newest[name]["worker"] != mine}

    def is_over(self) -> bool:
        return not self._waiting and not self._is_waiting_for_hosts()

    def __exit__(self, *_: object) -> None:
        """Write the last events, remove this worker's sign of life, and dismiss other hosts."""
        self._beat()
        files.remove(self._sign)
        self._group.announce(self._root, "")

    def _is_waiting_for_hosts(self) -> bool:
        absent = ", ".join(map(str, self._group.absent(self._root)))
        if absent and absent != self._reported:
            self._say(f"waiting for host {absent} of {self._group.count}")
        self._reported = absent
        return bool(absent)

    def _can_start(self, job: Job) -> bool:
        """Return whether a job's input exists; drop the job if that will never come."""
        if job.after in self.failures and not job.is_ready():
            self._drop(job, f"not started, because {job.after} failed")
        elif job.after in self.left_out and not job.is_ready():
            self._leave_out(job)
        else:
            unfinished = {other.name for other in self._waiting} | self._held.keys()
            return job.after not in unfinished or job.is_ready()
        return False

    def _claim(self, job: Job) -> bool:
        """Claim a job that this process has locked; False if another has it, or it is over."""
        while True:
            self._log.refresh()
            event = self._log.newest.get(job.name, {"kind": "", "number": 0})
            if event["kind"] == "failed" and event["number"] > self._first:
                self._drop(job, f"{event['reason']} (on {event['host']})")
            elif event["kind"] == "claim" and self._is_alive(event, job):
                return False
            elif job.is_done():
                self._drop(job)
                self._say(f"{job.name}: already done by another process")
            elif not self._budget.allows(self._log.newest, job.name):
                self._leave_out(job)
            elif self._log.append(self._event("claim", job.name)):
                return True
            elif self._log.refresh():
                continue
            return False

    def _is_alive(self, claim: Event, job: Job) -> bool:
        """Return whether another worker's claim holds, though this process has the job's lock."""
        if claim["host"] == self._me["host"] and job.held:
            return False  # the lock was free, so both the worker and its job have ended
        # A run in a bucket renews a lease, also if its worker was killed and it was not.
        lease = max(files.walk(f"{job.workdir}/lease"), default="")
        pulse = (_read(f"{self._root}/queue/workers/{claim['worker']}"), lease)
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
        return {"kind": kind, "job": name, **self._me, "unix": self._clock.unix()}

    def _beat(self) -> None:
        """Show that this worker lives, and write the events that are due."""
        self._next_beat = self._clock.now() + RENEW_SECONDS
        sign = self._me | {"unix": self._clock.unix(), "beat": self._clock.now()}
        files.write_whole(self._sign, json.dumps(sign))
        self._log.refresh()
        while self._ended:
            newest = self._log.newest[self._ended[0]["job"]]
            if newest["worker"] != self._me["worker"] or self._log.append(self._ended[0]):
                self._ended.pop(0)
            elif not self._log.refresh():
                break
