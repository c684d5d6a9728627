"""The queue: every job once and the dearest first, whoever is killed, stands still or is slow."""

import contextlib
import itertools
import json
import os
import socket
import tempfile
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from clip_jax.checkpoints.claim import LEASE_SECONDS, RENEW_SECONDS
from clip_jax.processes import Position
from clip_jax.scaling.queue import SCAN_SECONDS, Afford, Job, Queue, workers
from clip_jax.storage import files
from tests.clock import HandClock

WAITING = "waiting, since other workers have the runs that are left"


@dataclass
class Study:
    """A folder of three jobs, and the machines that see it."""

    root: Path
    clock: HandClock = field(default_factory=HandClock)
    said: list[str] = field(default_factory=list)
    taken: list[Job] = field(default_factory=list)

    def job(self, name: str, host: str) -> Job:
        """A job whose lock is on a disk of that host."""
        done = self.root / name / "done"
        return Job(name, [name], self.root / name, self.root / host / name / "log.txt", done.exists)

    def worker(
        self,
        host: str = "here",
        names: str = "abc",
        afford: Afford = bool,
        group: Position | None = None,
        change: Callable[[Job], Job] = lambda job: job,
    ) -> Queue:
        jobs = [change(self.job(name, host)) for name in names]
        with mock.patch.object(socket, "gethostname", autospec=True, return_value=host):
            return Queue(self.root, jobs, afford, group or Position(), self.said.append, self.clock)

    def end(self, worker: Queue, job: Job, outcome: str = "done", reason: str = "") -> str:
        if outcome == "done":
            (self.root / job.name).mkdir(exist_ok=True)
            (self.root / job.name / "done").touch()
        left = worker.release(job, outcome, reason)
        job.unlock()
        return left

    def take(self, worker: Queue) -> str:
        """The name of the job that a worker takes after a pause, which it then runs."""
        self.clock.advance(SCAN_SECONDS)
        job = worker.take()
        self.taken += [job] if job else []
        return job.name if job else ""

    @property
    def jobs(self) -> dict[str, Job]:
        return {job.name: job for job in self.taken}

    def log(self) -> list[tuple[str, str]]:
        paths = sorted((self.root / "queue/events").iterdir())
        events = [json.loads(path.read_text()) for path in paths]
        return [(event["kind"], event["subject"]) for event in events]

    def kill(self) -> None:
        """As if the worker and the process of every job that was taken were killed."""
        for job in self.taken:
            job.unlock()


@pytest.fixture
def study(tmp_path: Path) -> Generator[Study]:
    made = Study(tmp_path)
    yield made
    made.kill()


def test_workers_take_the_first_that_is_free_and_none_takes_another_s(study: Study):
    first, second = study.worker("one"), study.worker("two")
    assert [study.take(worker) for worker in (first, second, first, second)] == ["a", "b", "c", ""]
    assert not first.is_over()  # it may have to take over
    assert study.end(first, study.jobs["a"]) == "; 2 left"
    assert study.end(first, study.jobs["c"]) == "; 1 left"
    assert [study.take(first), study.take(second)] == ["", ""]
    assert study.said == [
        WAITING,
        "a: already done by another process",
        "c: already done by another process",
    ]
    study.end(second, study.jobs["b"])
    assert study.take(first) == ""
    assert first.is_over()
    assert second.is_over()
    with first, second:
        pass
    assert study.log() == [
        ("claim", "a"),
        ("claim", "b"),
        ("claim", "c"),
        ("done", "a"),
        ("done", "c"),
        ("done", "b"),
    ]
    assert list((study.root / "queue/workers").iterdir()) == []


def test_of_two_who_claim_at_once_one_goes_on_to_the_next(study: Study):
    one, two = study.worker("one"), study.worker("two")
    plain, first = files.create, [True]

    def another_is_faster(path, content):
        if first.pop() if first else False:
            assert study.take(two) == "a"
        return plain(path, content)

    with mock.patch.object(files, "create", autospec=True, side_effect=another_is_faster):
        assert study.take(one) == "b"
    assert study.log() == [("claim", "a"), ("claim", "b")]


@pytest.mark.parametrize("sign", ["worker", "run"])
def test_on_another_machine_once_there_was_no_sign_of_life(study: Study, sign: str):
    first, second = study.worker("one", names="a"), study.worker("two", names="a")
    assert [study.take(first), study.take(second)] == ["a", ""]
    for beat in range(10):
        study.clock.advance(LEASE_SECONDS - 3 * SCAN_SECONDS)
        if sign == "worker":
            assert not first.lost()
        else:  # of a process in a bucket, whose worker was killed
            (study.root / "a/lease").mkdir(parents=True, exist_ok=True)
            (study.root / f"a/lease/{beat:012d}").touch()
        assert study.take(second) == ""
    study.clock.advance(LEASE_SECONDS - 2 * SCAN_SECONDS)
    assert study.take(second) == ""
    assert study.take(second) == "a"
    # A worker that stood still loses its job, and writes nothing about it.
    study.clock.advance(RENEW_SECONDS)
    assert first.lost() == {"a"}
    study.end(first, study.jobs["a"], "stopped")
    assert study.log() == [("claim", "a"), ("claim", "a")]
    assert not first.is_over()


def test_no_job_starts_that_would_exceed_the_limit_with_those_of_all_workers(study: Study):
    def afford(names: Collection[str]) -> bool:
        return sum({"a": 5, "b": 3, "c": 2}[name] for name in set(names)) <= 7

    first, second = (study.worker(host, afford=afford) for host in ("one", "two"))
    assert [study.take(first), study.take(second)] == ["a", "c"]
    assert second.left_out == ["b"]
    assert study.said == ["b: left out, since it would exceed the limit"]
    study.end(first, study.jobs["a"], "failed", "exit code 1")  # which has cost all the same
    assert study.take(first) == ""
    assert first.left_out == ["b"]
    assert study.take(study.worker("three", afford=afford)) == "a"  # what was begun may go on


def test_a_bucket_that_is_out_of_reach_is_asked_again(study: Study):
    first = study.worker()
    with mock.patch.object(files, "create", autospec=True, side_effect=OSError("unreachable")):
        assert study.take(first) == ""
    assert study.said == [f"{study.root} is out of reach and tried again: unreachable"]
    assert study.take(first) == "a"
    with mock.patch.object(files, "write_whole", autospec=True, side_effect=OSError("lost")):
        study.end(first, study.jobs["a"])
    assert study.log() == [("claim", "a")]
    study.clock.advance(RENEW_SECONDS)
    first.lost()
    assert study.log() == [("claim", "a"), ("done", "a")]


def test_a_stop_that_is_written_late_does_not_end_the_next_claim(study: Study):
    first, second = study.worker("one"), study.worker("two")
    assert study.take(first) == "a"
    with mock.patch.object(files, "create", autospec=True, side_effect=OSError("unreachable")):
        study.end(first, study.jobs["a"], "stopped")
        assert study.take(first) == ""
    assert study.take(first) == "a"
    study.clock.advance(RENEW_SECONDS)
    assert not first.lost()
    assert study.take(second) == "b"
    assert study.log() == [("claim", "a"), ("stopped", "a"), ("claim", "a"), ("claim", "b")]


def test_who_works_on_what_can_be_read_meanwhile(study: Study):
    first = study.worker("one")
    study.take(first)
    (words,) = workers(study.root, study.clock.unix()).values()
    assert words.startswith("process ")
    assert words.endswith(" on one")
    assert workers(study.root, study.clock.unix() + 600)["a"].endswith("on one, silent for 10 min")
    study.end(first, study.jobs["a"])
    assert workers(study.root, study.clock.unix()) == {}


# ------------------------------------------------------------------ a model of the queue


@dataclass(eq=False)
class Worker:
    """A worker, and the state that it is expected to have."""

    queue: Queue
    host: str
    start: int  # number of events before it started
    signed: float | None  # time of its last sign of life; None after its end
    tried: float  # time when it last tried to give one
    waiting: list[str] = field(default_factory=lambda: [*"abcd"])
    running: dict[str, Job] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    due: list[tuple[str, str]] = field(default_factory=list)  # (job, outcome) still to be written
    signs: dict[tuple[str, int], tuple[float | None, float]] = field(default_factory=dict)


@dataclass
class Newest:
    """The newest event of a job."""

    kind: str
    worker: Worker
    number: int


WHICH = st.integers(0, 2)
ACTS = st.sampled_from(  # (act of a worker, fault of the storage); repeated ones are more likely
    [
        *[("take", "")] * 6,
        *[("done", ""), ("failed", ""), ("stopped", ""), ("look", "")] * 2,
        *[("wait", "")] * 3,
        *itertools.product(["done", "failed", "stopped"], ["unreachable"]),
        *itertools.product(["take"], ["unreachable", "answered", "lost"]),
    ]
)


class Fates(RuleBasedStateMachine):
    """Workers on two machines run jobs, which may fail or stop. Workers may be killed or hang, and
    the storage may be unreachable.

    Each worker takes the first free job: one that is not done, that no living worker runs, and that
    has not failed since the worker started. Job b needs the result of job c. Only `limit` jobs may
    start. In the end a worker on a third machine runs the remaining jobs, each once.
    """

    def __init__(self):
        super().__init__()
        self.ends = contextlib.ExitStack()
        self.ends.enter_context(mock.patch.object(os, "fsync", autospec=True))  # fsync is slow
        folder = self.ends.enter_context(tempfile.TemporaryDirectory())
        self.study, self.clock = (made := Study(Path(folder))), made.clock
        self.workers: list[Worker] = []
        self.newest: dict[str, Newest] = {}
        self.done: set[str] = set()
        self.number = 0

    @initialize(limit=st.sampled_from([1, 2, 4, 4]))
    def begin(self, limit):
        self.limit = limit
        for host in ("one", "one", "two"):
            self.start(host)

    def open(self, host):
        def after_c(job):
            is_ready = (self.study.root / "c/done").exists
            return job._replace(after="c", is_ready=is_ready) if job.name == "b" else job

        return self.study.worker(
            host, "abcd", lambda names: len({*names}) <= self.limit, None, after_c
        )

    def write(self, name, kind, worker):
        self.number += 1
        self.newest[name] = Newest(kind, worker, self.number)

    def sign(self, worker, is_reachable=True):
        """Expect a sign of life, and the outcomes of jobs that no other worker has taken over."""
        worker.signed = worker.tried = self.clock.now()
        while worker.due:
            name, outcome = worker.due[0]
            if self.newest[name].worker is worker:
                if not is_reachable:
                    return
                self.write(name, outcome, worker)
            worker.due.pop(0)

    def start(self, host):
        now = self.clock.now()
        self.workers.append(Worker(self.open(host), host, self.number, now, now))

    @rule(acts=st.lists(st.tuples(WHICH, ACTS), min_size=1, max_size=6))
    def work(self, acts):
        for which, (act, fault) in acts:
            worker = self.workers[which]
            if act == "wait":
                self.clock.advance(LEASE_SECONDS - SCAN_SECONDS)
            elif act == "look":
                self.look(worker)
            elif act == "take":
                self.take(worker, fault)
            elif worker.running:
                name = next(iter(worker.running))
                self.end(worker, name, act, fault)
                self.done |= {name} if act == "done" else set()

    def take(self, worker, fault):
        if worker.due:
            fault = ""
        self.clock.advance(SCAN_SECONDS)
        with creating(fault) as claims:
            job = worker.queue.take()
        if worker.due:
            self.sign(worker)
        name = self.first_free(worker)
        assert name == "".join(claims)
        if name and fault != "unreachable":
            self.write(name, "claim", worker)
        if not name or fault in ("unreachable", "lost"):
            assert job is None
        else:
            assert job.name == name
            worker.waiting.remove(name)
            worker.running[name] = job
        assert worker.queue.is_over() == (not worker.waiting)
        assert worker.queue.failures == worker.failures
        assert worker.queue.left_out == worker.left_out

    def first_free(self, worker):
        for name in [*worker.waiting]:
            undone = {*worker.waiting, *worker.running, *worker.failures, *worker.left_out}
            newest = self.newest.get(name)
            if name == "b" and "c" in undone - self.done:
                if "c" in worker.failures:
                    worker.waiting.remove(name)
                    worker.failures[name] = "not started, because c failed"
                elif "c" in worker.left_out:
                    worker.waiting.remove(name)
                    worker.left_out.append(name)
            elif any(name in other.running for other in self.workers if other.host == worker.host):
                continue
            elif newest and newest.kind == "failed" and newest.number > worker.start:
                worker.waiting.remove(name)
                worker.failures[name] = f"why (on {newest.worker.host})"
            elif newest and newest.kind == "claim" and self.is_alive(name, worker):
                continue
            elif name in self.done:
                worker.waiting.remove(name)
            elif len({*self.newest, name}) > self.limit:
                worker.waiting.remove(name)
                worker.left_out.append(name)
            else:
                return name
        return ""

    def is_alive(self, name, observer):
        """Return whether an observer has recently seen a sign of life of a job's worker."""
        newest, now = self.newest[name], self.clock.now()
        if newest.worker.host == observer.host:
            return False  # on the same machine, its lock would be held
        key = name, newest.number
        sign, since = observer.signs.get(key, (newest.worker.signed, now))
        since = since if sign == newest.worker.signed else now
        observer.signs[key] = newest.worker.signed, since
        return now < since + LEASE_SECONDS

    def end(self, worker, name, outcome, fault=""):
        with creating(fault):
            self.study.end(worker.queue, worker.running.pop(name), outcome, "why")
        worker.due.append((name, outcome))
        if outcome == "failed":
            worker.failures[name] = "why"
        elif outcome == "stopped":
            worker.waiting.insert(0, name)
        self.sign(worker, is_reachable=not fault)

    def look(self, worker):
        """Let a worker give a sign of life, and stop the jobs that others have taken over."""
        now = self.clock.now()
        lost = worker.queue.lost()
        if now >= worker.tried + RENEW_SECONDS:
            self.sign(worker)
            assert lost == {x for x in worker.running if self.newest[x].worker is not worker}
        for name in lost:
            assert self.newest[name].worker is not worker
            self.end(worker, name, "stopped")

    @rule(which=WHICH, host=st.sampled_from(["one", "two"]))
    def replace(self, which, host):
        """Replace a worker: an idle one ends, one with jobs is killed with them."""
        worker = self.workers.pop(which)
        if not worker.running:
            with worker.queue:
                pass
            self.sign(worker)
            worker.signed = None
        self.kill(worker)
        self.start(host)

    def kill(self, worker):
        for job in worker.running.values():
            job.unlock()

    def teardown(self):
        with self.ends:
            for worker in self.workers:
                self.kill(worker)
            last, taken = self.open("three"), []
            for _ in range(9):
                self.clock.advance(LEASE_SECONDS / 2)
                while job := last.take():
                    taken.append(job.name)
                    self.study.end(last, job)
            assert last.is_over()
            assert not last.failures
            assert len(taken) == len({*taken} - self.done)
            assert len({*taken} | self.done) == self.limit


@contextlib.contextmanager
def creating(fault: str) -> Generator[list[str]]:
    """Create files of events with a fault of the storage; yield the jobs that were claimed.

    "unreachable": no file is created. "answered": a file is created, but the storage reports that
    it existed, as after a repeated request. "lost": a file is created, but the request fails.
    """
    plain, claims = files.create, []

    def create(path, content):
        event = json.loads(content)
        claims.extend([event["subject"]] if event["kind"] == "claim" else [])
        if fault == "unreachable":
            raise OSError(fault)
        is_made = plain(path, content)
        if fault == "lost":
            raise OSError(fault)
        return is_made and fault != "answered"

    with mock.patch.object(files, "create", autospec=True, side_effect=create):
        yield claims


TestFates = Fates.TestCase
TestFates.settings = settings(stateful_step_count=12)


# ------------------------------------------------------------------ groups of hosts


def pod(study: Study) -> list[Queue]:
    return [study.worker(f"host{i}", "ab", group=Position("pod", i, 3)) for i in range(3)]


def test_hosts_of_a_group_do_the_same_jobs_each_when_all_are_free(study: Study):
    lead, *others = hosts = pod(study)
    assert study.take(lead) == ""
    assert study.said == ["waiting for host 2, 3 of 3"]
    assert [study.take(host) for host in others] == ["", ""]
    assert not any(host.is_over() for host in hosts)
    assert [study.take(host) for host in hosts] == ["a", "a", "a"]
    assert not any(host.lost() for host in hosts)
    job = study.jobs["a"]
    study.end(lead, job)
    assert workers(study.root, study.clock.unix()) == {}
    others[0].release(job, "done")
    assert study.take(lead) == ""
    assert study.said[-1] == "waiting for host 3 of 3"
    others[1].release(job, "done")
    assert [study.take(host) for host in hosts] == ["b", "b", "b"]
    study.end(lead, study.jobs["b"])
    assert study.take(lead) == ""
    assert not any(host.is_over() for host in hosts)
    for host in others:
        host.release(study.jobs["b"], "done")
    assert study.take(lead) == ""
    assert lead.is_over()
    with lead:
        pass
    assert [study.take(host) for host in others] == ["", ""]
    assert all(host.is_over() for host in others)
    again = study.worker("host1", "ab", group=Position("pod", 1, 3))
    assert study.take(again) == ""
    assert not again.is_over()  # that was the end of an earlier command


def test_hosts_that_were_restarted_join_at_the_next_job(study: Study):
    lead, *others = pod(study)
    assert [study.take(host) for host in (lead, *others)] == ["", "", ""]
    assert [study.take(host) for host in (lead, *others)] == ["a", "a", "a"]
    others[1] = study.worker("host2", "ab", group=Position("pod", 2, 3))
    assert study.take(others[1]) == ""  # not in the middle of a job
    others[0].release(study.jobs["a"], "failed", "exit code 1")
    study.end(lead, study.jobs["a"], "failed", "exit code 1")
    study.kill()
    assert [study.take(host) for host in (lead, *others)] == ["b", "b", "b"]
    # The first host is restarted: what the others wrote before does not count.
    study.kill()
    lead = study.worker("host0", "ab", group=Position("pod", 0, 3))
    for host in others:
        host.release(study.jobs["b"], "failed")
        assert study.take(lead) == ""
        assert study.take(host) == ""
        assert not host.is_over()
    assert study.take(lead) == "a"


def test_a_group_that_another_worker_replaces_gives_up_its_job(study: Study):
    hosts = pod(study)
    for _ in range(2):
        for host in hosts:
            study.take(host)
    study.kill()
    single = study.worker("host0", "a")
    assert study.take(single) == "a"
    study.clock.advance(RENEW_SECONDS)
    assert [host.lost() for host in hosts] == [{"a"}] * 3
