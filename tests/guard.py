"""The rules for unit tests: they start no process, open no socket, do not sleep or read the time.

The rules hold for the package and the tests, not for libraries. What counts is the nearest caller
outside of the modules in _PASSED_OVER. The package reads the time, and waits, through
`clip_jax.clock.Clock`, which unit tests replace by `tests.clock.HandClock`.
"""

import functools
import multiprocessing.process
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Folders of `tests/` with other kinds of tests, which have stages of their own in `.ci/run`.
ELSEWHERE = ("contract", "mesh", "workflow", "reference", "programs")

_PASSED_OVER = ("subprocess", "socket", "multiprocessing", "concurrent", "contextlib")
_WHY = "in a unit test: see `tests/guard.py`"
is_on: bool = False  # whether the rules apply at the moment


def is_unit(path: Path, tests: Path) -> bool:
    """Return whether a test file contains unit tests."""
    return path.is_relative_to(tests) and path.relative_to(tests).parts[0] not in ELSEWHERE


def install() -> None:
    """Wrap each function that the rules forbid in a check."""
    for owner, name in (
        *((time, name) for name in ("sleep", "time", "monotonic", "perf_counter")),
        *((os, name) for name in ("fork", "posix_spawn")),
        (subprocess.Popen, "__init__"),
        (multiprocessing.process.BaseProcess, "start"),
        *((socket.socket, name) for name in ("connect", "connect_ex", "bind")),
    ):
        setattr(owner, name, _checked(getattr(owner, name), f"{owner.__name__}.{name}"))


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        if is_on:
            frame = sys._getframe(1)
            while frame and _module(frame).partition(".")[0] in _PASSED_OVER:
                frame = frame.f_back
            caller = _module(frame) if frame else ""
            if caller.partition(".")[0] in ("clip_jax", "tests") and caller != "clip_jax.clock":
                raise AssertionError(f"{caller} calls {name} {_WHY}")
        return function(*args, **kwargs)

    return checked


def _module(frame: Any) -> str:
    return frame.f_globals.get("__name__", "")
