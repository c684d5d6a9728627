"""`launch/local.py`: whom it starts, whom it waits for and ends, and whom it names as the cause."""

import argparse
import contextlib
import importlib.util
import signal
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import pytest

from tests.clock import HandClock
from tests.conftest import ROOT

spec = importlib.util.spec_from_file_location("local", ROOT / "launch/local.py")
assert spec
assert spec.loader
local = importlib.util.module_from_spec(spec)
spec.loader.exec_module(local)

NEVER, GRACE = float("inf"), 20.0
LOST = "JaxRuntimeError: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:26289"
OPTIONS = argparse.Namespace(
    processes=2, devices=4, grace=GRACE, module="clip_jax", command=["train", "x.py"]
)


class Fake:
    """A process that ends at a time of the clock, or at a signal with the code `at_signal`."""

    def __init__(
        self,
        clock: HandClock,
        end: float,
        code: int,
        words: str = "no such file",
        *,
        at_signal: int = 0,
        during: Callable[[], object] = lambda: None,
    ) -> None:
        self._clock, self._end, self._code = clock, clock.now() + end, code
        self._at_signal, self._during, self._begun = at_signal, during, clock.now()
        self.pid, self.stdout, self.returncode = 7, ["reading\n", "\n", words], None
        self.signals: list[int] = []
        self.killed: float | None = None  # how many seconds after the start

    def poll(self) -> int | None:
        self._during()
        if self.returncode is None and self._clock.now() >= self._end:
            self.returncode = self._code
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.signals.append(number)
        self.returncode = self.returncode or self._at_signal

    def kill(self) -> None:
        self.returncode, self.killed = -signal.SIGKILL, self._clock.now() - self._begun


@contextlib.contextmanager
def started(*fakes: Fake):
    """Let `run` start these; give back the mock of Popen."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with mock.patch.object(subprocess, "Popen", autospec=True, side_effect=fakes) as popen:
            yield popen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(
    ("ends", "expected", "killed"),
    [
        ([(3, 0), (9, 0)], (0, ""), None),
        ([(NEVER, 0), (5, 1)], (1, "process 1 ended first, with exit code 1: no such file"), 0),
        ([(5, -9), (NEVER, 0)], (137, "process 0 was killed by SIGKILL"), 1),
        # JAX aborts those whom another leaves: they are no cause, whoever is seen first.
        ([(5, -6), (5, -9)], (137, "process 1 was killed by SIGKILL"), None),
        ([(5, -6), (5, -9), (NEVER, 0)], (137, "process 1 was killed by SIGKILL"), 2),
        # A collective says that it lost the other, who may be seen to end later.
        (
            [(5, 1, LOST), (5.5, 1)],
            (1, "process 1 ended first, with exit code 1: no such file"),
            None,
        ),
        ([(5, 1, LOST), (NEVER, 0)], (1, f"process 0 ended first, with exit code 1: {LOST}"), 1),
        ([(5, 0), (5, 2)], (2, "process 1 ended first, with exit code 2: no such file"), None),
        # One that was told to stop has saved with the others: they have all the time they need.
        ([(5, 3), (90, 3)], (3, "process 0 ended first, with exit code 3: no such file"), None),
    ],
)
def test_the_first_that_fails_is_named_and_the_others_end(ends, expected, killed, capfd):
    clock = HandClock(skips=True)
    fakes = [Fake(clock, *end) for end in ends]
    options = argparse.Namespace(**vars(OPTIONS) | {"processes": len(fakes)})
    with started(*fakes) as popen:
        assert local.run(options, clock) == expected
    ends_at = pytest.approx(5 + GRACE, abs=0.2)
    assert [fake.killed for fake in fakes] == [
        ends_at if index == killed else None for index in range(len(fakes))
    ]
    calls = popen.call_args_list
    assert [call.args[0][1:] for call in calls] == [["-m", "clip_jax", "train", "x.py"]] * len(ends)
    for index, call in enumerate(calls):
        environment = call.kwargs["env"]
        assert environment["JAX_NUM_CPU_DEVICES"] == "4"
        assert environment["CLIP_JAX_PROCESS_COUNT"] == str(len(ends))
        assert environment["CLIP_JAX_PROCESS_INDEX"] == str(index)
        assert environment["CLIP_JAX_COORDINATOR"] == calls[0].kwargs["env"]["CLIP_JAX_COORDINATOR"]
    output = capfd.readouterr().out
    assert output.endswith("\n")  # also of a process that ended in the middle of a line
    lines = output.splitlines()
    assert lines[: len(ends)] == [f"launch: process {i} is pid 7" for i in range(len(ends))]
    assert lines.count("[1] no such file") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_to_those_that_run(number):
    clock = HandClock(skips=True)
    first = Fake(clock, 1, 0)

    came: list[int] = []

    def signalled() -> None:
        if clock.now() >= 1_003 and not came:
            came.append(number)
            signal.raise_signal(number)

    second = Fake(clock, NEVER, 0, at_signal=3, during=signalled)
    with started(first, second):
        code, _ = local.run(OPTIONS, clock)
    assert (code, first.signals, second.signals) == (3, [], [number])


@pytest.mark.parametrize(
    ("codes", "starts"),
    [([1, 137, 0], 3), ([1, 1, 1, 1], 3), ([2], 1), ([1, 3], 2), ([130], 1), ([0], 1)],
)
def test_what_failed_is_started_again_so_often(codes, starts, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["local.py", "--restarts", "2", "train", "x.py"])
    ends = [(code, f"cause {code}" if code else "") for code in codes]
    with mock.patch.object(local, "run", autospec=True, side_effect=ends) as run:
        assert local.main() == codes[starts - 1]
    assert run.call_count == starts
    printed = capsys.readouterr()
    assert printed.out.count("starting again") == starts - 1
    assert printed.err == (f"launch: cause {codes[starts - 1]}\n" if codes[starts - 1] else "")


@pytest.mark.parametrize("words", [["--processes", "2"], ["--devices", "0", "train", "x.py"]])
def test_a_launch_of_nothing_is_refused(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["local.py", *words])
    with pytest.raises(SystemExit, match="2"):
        local.main()
    assert "at least one process, one device" in capsys.readouterr().err
