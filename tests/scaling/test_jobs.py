"""Processes a few at a time: failures, order, locks, signals. The processes are fakes."""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from unittest import mock

import pytest

from clip_jax.processes import Position
from clip_jax.scaling import jobs
from clip_jax.scaling.jobs import Stopped, run
from clip_jax.scaling.queue import Job, Queue
from clip_jax.storage.events import Events
from tests.clock import HandClock


@dataclass
class Process:
    """What a fake process prints, and when it acts and ends; it holds the lock that it inherits."""

    output: str = ""
    code: int = 0
    seconds: float = 1.0
    acts: dict[float, Callable[[], object]] = field(default_factory=dict)
    returncode: int | None = None
    pid: int = 7
    terminated: int = 0

    def begin(self, now: float, lock: int, log: IO[bytes]) -> None:
        self._began, self._lock, self.returncode = now, os.dup(lock), None
        log.write(self.output.encode())

    def go_on(self, now: float) -> None:
        if self.returncode is not None:
            return
        for after in [x for x in self.acts if self._began + x <= now]:
            self.acts.pop(after)()
        if self._began + self.seconds <= now:
            self.returncode = self.code
            os.close(self._lock)

    def poll(self) -> int | None:
        return self.returncode

    def kill(self) -> None:
        self.returncode = -signal.SIGKILL
        os.close(self._lock)

    def terminate(self) -> None:
        self.terminated += 1
        self.seconds, self.code = self.seconds + 1, 1  # which it takes to save


class Machine(HandClock):
    """A clock whose passing lets the processes go on, started or orphaned."""

    def __init__(self, folder: Path) -> None:
        super().__init__(skips=True)
        self._folder, self._programs = folder, dict[str, Process]()
        self.started: list[str] = []
        self.said: list[str] = []
        self.cpus: list[set[int]] = []  # of each process that has not all

    def job(self, name: str, *, done_after: float | None = 1.0, **program: Any) -> Job:
        """A job whose process leaves `done` in its directory, unless `done_after` is None."""
        directory = self._folder / name
        directory.mkdir()
        process = self._programs[name] = Process(**program)
        if done_after is not None:
            process.acts |= {done_after: (directory / "done").touch}
        return Job(name, [name], directory, directory / "log.txt", (directory / "done").exists)

    def start(self, args: list[str], *, pass_fds, stdout, **how) -> Process:
        assert how == {
            "env": {"A": "b"},
            "stdin": subprocess.DEVNULL,
            "stderr": subprocess.STDOUT,
            "process_group": 0,
        }
        self._programs[args[0]].begin(self.now(), *pass_fds, stdout)
        self.started += args
        return self._programs[args[0]]

    def pin(self, pid: int, cpus: frozenset[int]) -> None:
        assert pid == Process.pid
        self.cpus.append({*cpus})

    def advance(self, seconds: float) -> None:
        super().advance(seconds)
        for name in self.started:
            self._programs[name].go_on(self.now())

    def run(self, some: list[Job], at_a_time: int = 1) -> dict[str, str]:
        with Queue(self._folder, some, bool, Position(), self.said.append, self) as queue:
            run(queue, at_a_time, {"A": "b"}, self.said.append, self)
        return queue.failures


@pytest.fixture
def machine(tmp_path: Path) -> Generator[Machine]:
    made = Machine(tmp_path)
    with (
        mock.patch.object(subprocess, "Popen", autospec=True, side_effect=made.start),
        mock.patch.object(os, "sched_getaffinity", autospec=True, return_value={0, 1, 2, 5, 6}),
        mock.patch.object(os, "sched_setaffinity", autospec=True, side_effect=made.pin),
    ):
        yield made


def test_a_failure_is_reported_with_its_last_line_and_the_rest_go_on(machine: Machine):
    some = [
        machine.job("a", output="fine\n"),
        machine.job("b", output="reading\nno such file\n", code=1, done_after=None),
        machine.job("c", code=-signal.SIGKILL, done_after=None),
        machine.job("d", output="early\n", done_after=None),  # exits with 0, but left nothing
        machine.job("e"),
    ]
    failures = machine.run(some, 2)
    assert machine.started == list("abcde")
    assert failures.keys() == {"b", "c", "d"}
    assert re.fullmatch("exit code 1; .*log.txt ends: no such file", failures["b"])
    assert failures["c"].startswith("killed by SIGKILL")
    assert failures["d"].endswith("ends: early")
    assert some[0].log.read_text() == "fine\n"
    assert len(machine.said) == 2 * 5
    assert machine.run(some[:1]) == {}
    assert machine.said[-1] == "a: already done by another process"
    assert machine.started == list("abcde")


def test_how_long_each_took_and_how_many_are_left_is_said(machine: Machine):
    machine.run([machine.job(name, seconds=60) for name in "ab"])
    assert machine.said == [
        "a: started as process 7",
        "a: done after 1.0 min; 1 left",
        "b: started as process 7",
        "b: done after 1.0 min; 0 left",
    ]
    assert set(machine.slept) == {jobs.POLL_SECONDS}


def test_jobs_share_the_cpus(machine: Machine):
    seconds = {"a": 1, "b": 9, "c": 1, "d": 1}
    machine.run([machine.job(name, seconds=x) for name, x in seconds.items()], 2)
    assert machine.cpus == [{0, 1}, {2, 5, 6}, {0, 1}, {0, 1}]  # b has the others all the time
    machine.run([machine.job("alone")])
    machine.run([machine.job(name) for name in "efghij"], 6)
    assert len(machine.cpus) == 4


def test_a_job_waits_for_what_another_makes_and_does_not_begin_if_that_failed(machine, tmp_path):
    made = tmp_path / "made"
    first = machine.job("a", acts={0.5: made.touch})
    broken = machine.job("c", code=1, done_after=None)
    second, third, last = (machine.job(name) for name in "bde")
    second = second._replace(after="a", is_ready=made.exists)
    third = third._replace(after="c", is_ready=lambda: False)
    last = last._replace(after="done before", is_ready=lambda: False)  # it will say what it misses
    failures = machine.run([second, third, last, first, broken], 2)
    # b begins when what it needs is there, though its maker has not ended.
    assert machine.started == ["e", "a", "b", "c"]
    assert failures.keys() == {"c", "d"}
    assert failures["d"] == "not started, because c failed"


def test_no_second_process_starts_beside_an_orphan(machine: Machine):
    """A runner is killed; the next waits for the process that it left behind."""
    one = machine.job("a", seconds=3, done_after=3.0)
    with (
        mock.patch.object(machine, "sleep", autospec=True, side_effect=SystemExit),
        pytest.raises(SystemExit),
    ):
        machine.run([one])
    assert machine.run([one]) == {}
    waiting = "waiting, since other workers have the runs that are left"
    assert machine.said[1:] == [waiting, "a: already done by another process"]
    assert machine.started == ["a"]


def test_what_another_worker_has_taken_over_is_killed(machine: Machine, tmp_path):
    """This one stood still so long that its claim was no longer believed; it may get it back."""

    def take_over():
        claim = {"kind": "claim", "subject": "a", "worker": "other", "host": "far"}
        assert Events(f"{tmp_path}/queue/events").append(claim)

    job = machine.job("a", seconds=30, done_after=30, acts={0.5: take_over})
    assert machine.run([job]) == {}
    assert machine.started == ["a", "a"]
    assert machine.said[1].startswith("a: stopped after 0.2 min: killed by SIGKILL")
    assert machine.said[-1].startswith("a: done after 0.5 min")


def test_a_signal_terminates_what_runs_and_starts_no_others(machine: Machine):
    acts = {0.5: lambda: signal.raise_signal(signal.SIGINT)}
    some = [machine.job("a", acts=acts, done_after=None), machine.job("b")]
    before = [*map(signal.getsignal, (signal.SIGTERM, signal.SIGINT))]
    with pytest.raises(Stopped, match=r"stopped by SIGINT; .* again to continue"):
        machine.run(some)
    assert [*map(signal.getsignal, (signal.SIGTERM, signal.SIGINT))] == before
    assert machine.started == ["a"]
    assert machine._programs["a"].terminated == 1
    assert machine.said[1].startswith("a: stopped after 0.0 min: exit code 1; ")
