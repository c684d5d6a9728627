"""The queue: every job once and the dearest first, whoever is killed, stands still or is slow."""

import json
import socket
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import pytest

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


def test_a_killed_worker_s_job_is_taken_over_on_its_machine_at_once(study: Study):
    first, second = study.worker(names="a"), study.worker(names="a")
    assert [study.take(first), study.take(second)] == ["a", ""]
    study.clock.advance(10 * LEASE_SECONDS)
    assert study.take(second) == ""  # its process lives on, though the worker may not
    study.kill()
    assert study.take(second) == "a"


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


def test_what_failed_is_tried_again_by_later_workers_alone(study: Study):
    first, second = study.worker("one", names="ab"), study.worker("two", names="ab")
    assert study.take(first) == "a"
    study.end(first, study.jobs["a"], "failed", "exit code 1")
    assert study.take(second) == "b"
    assert first.failures == {"a": "exit code 1"}
    assert second.failures == {"a": "exit code 1 (on one)"}
    study.end(second, study.jobs["b"], "stopped")
    assert study.take(first) == "b"
    assert study.take(study.worker("three")) == "a"


def test_a_stopped_job_is_the_first_to_be_taken_again(study: Study):
    """Else its checkpoint waits until all others of the study are done."""
    first = study.worker()
    assert [study.take(first), study.take(first)] == ["a", "b"]
    study.end(first, study.jobs["b"], "stopped")
    assert [study.take(first), study.take(first)] == ["b", "c"]
    study.end(first, study.jobs["a"], "stopped")
    study.end(first, study.jobs["b"], "stopped")
    assert [study.take(first), study.take(first)] == ["b", "a"]


def test_jobs_wait_for_their_input_and_are_dropped_if_it_fails(study: Study):
    def after_a(job: Job) -> Job:
        return job if job.name == "a" else job._replace(after="a", is_ready=made.exists)

    made = study.root / "made"
    first, second = study.worker("one", change=after_a), study.worker("two", change=after_a)
    assert [study.take(first), study.take(second)] == ["a", ""]
    made.touch()
    assert study.take(second) == "b"
    made.unlink()
    study.end(first, study.jobs["a"], "failed", "exit code 1")
    assert [study.take(first), study.take(second)] == ["", ""]
    assert first.failures["c"] == second.failures["c"] == "not started, because a failed"


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


def test_jobs_whose_input_is_too_expensive_are_left_out(study: Study):
    def after_a(job: Job) -> Job:
        return job._replace(after="a", is_ready=lambda: False) if job.name == "b" else job

    first = study.worker(afford=lambda names: "a" not in names, change=after_a)
    assert study.take(first) == "c"
    assert study.take(first) == ""
    assert first.left_out == ["a", "b"]


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


def test_who_works_on_what_can_be_read_meanwhile(study: Study):
    first = study.worker("one")
    study.take(first)
    (words,) = workers(study.root, study.clock.unix()).values()
    assert words.startswith("process ")
    assert words.endswith(" on one")
    assert workers(study.root, study.clock.unix() + 600)["a"].endswith("on one, silent for 10 min")
    study.end(first, study.jobs["a"])
    assert workers(study.root, study.clock.unix()) == {}


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
