"""Runs of one or several processes whose output is read line by line: what is waited for is a line,
a file that is closed, or a process that has ended."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DIGITS, FLAGS, ROOT, made_once

STEPS = 12
SMALL = (*FLAGS, "--steps", str(STEPS), "--evals.0.every-steps", "4")
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_DEFAULT_PRNG_IMPL": "threefry2x32",
}


class Command:
    """A program whose output is read line by line, in a session of its own."""

    def __init__(self, *command: object, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=ENVIRONMENT | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.lines: list[str] = []

    def until(self, text: str) -> str:
        """Wait for the line that has this text."""
        assert self._process.stdout
        for line in self._process.stdout:
            self.lines.append(line.rstrip())
            if text in line:
                return self.lines[-1]
        raise AssertionError(f"no {text!r} in:\n{self.output}")

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def pid(self, index: int) -> int:
        """A process that the launcher has started."""
        return next(
            int(x.split()[-1]) for x in self.lines if x.startswith(f"launch: process {index} is")
        )

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self, code: int = 0) -> list[str]:
        """Wait for its end; return all its lines."""
        assert self._process.stdout
        with self._process:  # or its pipe would be found open while another test runs
            self.lines += self._process.stdout.read().splitlines()
        assert self._process.returncode == code, self.output
        return self.lines

    def kill(self) -> None:
        """End the whole session, and what a launcher has started in sessions of their own."""
        if self._process.poll() is None:
            for line in self.lines:
                if line.startswith("launch: process "):
                    os.kill(int(line.split()[-1]), signal.SIGKILL)
            os.killpg(self._process.pid, signal.SIGKILL)
        with self._process:
            pass


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Start programs; what is left of them is killed with the test."""
    commands: list[Command] = []

    def begin(*command: object, **environment: str) -> Command:
        commands.append(Command(*command, **environment))
        return commands[-1]

    yield begin
    for command in commands:
        command.kill()


def training(
    workdir: Path,
    *flags: object,
    processes: int = 2,
    devices: int = 4,
    config: Path = DIGITS,
    small: tuple[str, ...] = SMALL,
) -> list[object]:
    """The words that train by the launcher and note what was read."""
    return [
        ROOT / "launch/local.py",
        "--processes",
        processes,
        "--devices",
        devices,
        "--grace",
        60,
        "--module",
        "tests.workflow.recorded",
        "train",
        config,
        "--workdir",
        workdir,
        *small,
        *flags,
    ]


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process with eight devices has trained, once for all workers."""

    def train(folder: Path) -> None:
        (folder / "run").mkdir()
        Command(*training(folder / "run", processes=1, devices=8)).end()

    return made_once(tmp_path_factory, "one", train) / "run"


def samples(workdir: Path, what: str = "index") -> dict[int, list[Any]]:
    """Which samples every step saw when it was last done, in the order of the global batch."""
    parts = []
    for path in sorted(workdir.glob("samples-*.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        parts.append({row["step"]: row for row in rows})
    return {
        step: [x for part in parts[: row["processes"]] for x in part[step][what]]
        for step, row in sorted(parts[0].items())
    }
