"""Run tests in forked processes, which start quickly: libraries are imported before the fork.

Each process imports the package itself. It may do so with a fault in one file, whose changed text
it compiles without writing it to the checkout.
"""

import contextlib
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

HERE = Path(__file__).parent.resolve()
POLL_SECONDS = 0.05
MEMORY = 6 << 30  # bytes; a process that uses more is killed
# A test hangs if its CPU time exceeds TIMES_AS_LONG times the usual one by MORE_SECONDS.
TIMES_AS_LONG, MORE_SECONDS = 10, 15
# A process hangs if it uses fewer than WAKING_SECONDS of CPU time in IDLE_SECONDS.
IDLE_SECONDS, WAKING_SECONDS = 60, 0.05


class RecordingError(Exception):
    """A process of tests ended before it could say which code they execute."""


class Ended(NamedTuple):
    """How a process that ran tests has ended."""

    outcome: str  # passed, failed, error (of pytest), crashed, timed out, cap (of CPU time)
    test: str  # the test that failed or ran last; empty if all passed
    message: str
    cpu: float  # CPU seconds
    passed: tuple[str, ...]  # tests


def preload(names: Sequence[str]) -> None:
    """Import libraries, as far as possible, and exempt them from garbage collection."""
    # Some scripts of this folder, such as coverage.py, have the names of libraries.
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != HERE]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.collect()
    gc.freeze()
    warnings.filterwarnings("ignore", message=".*fork", category=RuntimeWarning)
    warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
    threads = len(os.listdir("/proc/self/task"))
    print(f"imported {len(sys.modules)} modules; {threads} threads", flush=True)


def run_tests(
    checkout: Path,
    tests: dict[str, float],
    cpu_seconds: float,
    cache: Path,
    fault: tuple[str, str] | None = None,
) -> Ended:
    """Run tests in this order until one fails.

    `tests` are their ids and usual CPU seconds, `fault` a file of the package and its changed text.
    """
    with _scratch() as scratch:
        events = scratch / "events"

        def work() -> int:
            if fault:
                sys.meta_path.insert(0, _Changed(checkout, *fault))
            return _pytest(checkout, scratch, [*tests], _Reporter(events), "-x")

        pid = _fork(work, scratch, checkout, cache, cpu_seconds)
        status, cpu, killed = _watch(pid, events, tests)
        rows = _read(events)
        output = (scratch / "output").read_text(errors="replace")
    passed = [row["test"] for row in rows if row["kind"] == "end"]
    started = [row["test"] for row in rows if row["kind"] == "start"]
    failed = [row for row in rows if row["kind"] == "failed"]
    running = started[-1] if len(started) > len(passed) else ""
    if failed:
        first = failed[0]
        passed = [test for test in passed if test != first["test"]]
        ended = ("failed", first["test"], first["message"])
    elif killed:
        ended = ("timed out", running, killed)
    elif os.WIFSIGNALED(status):
        is_cap = os.WTERMSIG(status) == signal.SIGXCPU
        ended = ("cap" if is_cap else "crashed", running, f"signal {os.WTERMSIG(status)}")
    elif os.WEXITSTATUS(status):
        code = os.WEXITSTATUS(status)
        outcome = "error" if code in (1, 2, 3, 4, 5) else "crashed"
        ended = (outcome, running, f"exit code {code}: {_last_error(output)}")
    else:
        ended = ("passed", "", "")
    return Ended(*ended, cpu, tuple(passed))


def record(checkout: Path, test_file: str, cache: Path) -> dict[str, Any]:
    """Run a test file under coverage.

    Return "seconds" (CPU time of each test that passed), "failed" (tests), "lines" (for each file
    of the package and line, "phase|test" of the tests that run the line) and "modules" (libraries
    that the tests import).
    """
    with _scratch() as scratch:
        events, output = scratch / "events", scratch / "lines.json"

        def work() -> int:
            import coverage

            run = coverage.Coverage(
                data_file=None,
                config_file=False,
                source=[str(checkout / "clip_jax")],
                concurrency=["thread"],
            )
            run.start()
            code = _pytest(checkout, scratch, [test_file], _Reporter(events, run.switch_context))
            run.stop()
            data = run.get_data()
            lines = {
                str(Path(file).relative_to(checkout)): data.contexts_by_lineno(file)
                for file in data.measured_files()
            }
            modules = [x for x in sys.modules if x.partition(".")[0] not in ("clip_jax", "tests")]
            output.write_text(json.dumps({"lines": lines, "modules": modules}))
            return code

        pid = _fork(work, scratch, checkout, cache, 7200)
        status, _, _ = _watch(pid, events, None)
        rows = _read(events)
        if not output.exists():
            printed = (scratch / "output").read_text(errors="replace")[-3000:]
            raise RecordingError(f"{printed}\n{test_file} ended with status {status}")
        result = json.loads(output.read_text())
    seconds = {row["test"]: row["seconds"] for row in rows if row["kind"] == "end"}
    failed = {row["test"] for row in rows if row["kind"] == "failed"}
    passed = {test: round(x, 3) for test, x in seconds.items() if test not in failed}
    return result | {"seconds": passed, "failed": sorted(failed)}


# ------------------------------------------------------------------ in the forked process


class _Changed(importlib.machinery.SourceFileLoader):
    """Imports one module of the package from a changed text of its file."""

    def __init__(self, checkout: Path, file: str, content: str) -> None:
        name = file.removesuffix(".py").replace("/", ".")
        self._is_package = name.endswith(".__init__")
        super().__init__(name.removesuffix(".__init__"), str(checkout / file))
        self._content = content

    def find_spec(self, name: str, path: object = None, target: object = None) -> Any:
        if name != self.name:
            return None
        folders = [str(Path(self.path).parent)] if self._is_package else None
        return importlib.util.spec_from_file_location(
            name, self.path, loader=self, submodule_search_locations=folders
        )

    def get_code(self, fullname: str) -> Any:
        return compile(self._content, self.path, "exec", dont_inherit=True)


class _Reporter:
    """A pytest plugin that selects and orders tests, and records events as JSON lines."""

    def __init__(self, events: Path, switch: Callable[[str], None] | None = None) -> None:
        self._file = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._switch = switch or (lambda context: None)
        self._began = 0.0
        self.tests: Sequence[str] = ()

    def _write(self, kind: str, test: str, **more: Any) -> None:
        os.write(self._file, (json.dumps({"kind": kind, "test": test} | more) + "\n").encode())

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if self.tests:
            position = {test: index for index, test in enumerate(self.tests)}
            chosen = [item for item in items if item.nodeid in position]
            items[:] = sorted(chosen, key=lambda item: position[item.nodeid])

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self._write("failed", report.nodeid, message=f"collection: {_message(report)}")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._began = time.process_time()
        self._write("start", nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: Any) -> None:
        self._switch(f"setup|{item.nodeid}")

    def pytest_runtest_call(self, item: Any) -> None:
        self._switch(f"call|{item.nodeid}")

    def pytest_runtest_teardown(self, item: Any) -> None:
        self._switch(f"teardown|{item.nodeid}")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self._write("failed", report.nodeid, message=_message(report))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._write("end", nodeid, seconds=time.process_time() - self._began)


def _message(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return (crash.message if crash else str(report.longrepr)).strip()[:300]


def _pytest(
    checkout: Path, scratch: Path, tests: Sequence[str], reporter: _Reporter, *more: str
) -> int:
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    reporter.tests = tests if any("::" in test for test in tests) else ()
    quiet = ("-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-n", "0")
    rewriting = ("-W", "ignore::pytest.PytestAssertRewriteWarning")
    folder = f"--basetemp={scratch / 'tmp'}"
    return int(pytest.main([*quiet, *rewriting, folder, *more, *files], plugins=[reporter]))


def _fork(
    work: Callable[[], int], scratch: Path, checkout: Path, cache: Path, cpu_seconds: float
) -> int:
    """Start a process that calls `work` in the checkout; return its id."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 99
    try:
        os.setsid()
        output = os.open(scratch / "output", os.O_WRONLY | os.O_CREAT)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for old, new in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(old, new)
        limit = int(cpu_seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(checkout)
        os.environ |= {
            "PYTHONPATH": str(checkout),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "TMPDIR": str(scratch),
        }
        tempfile.tempdir = None
        sys.path.insert(0, str(checkout))
        warnings.resetwarnings()
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# ------------------------------------------------------------------ in the parent process


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="mutants-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _watch(pid: int, events: Path, usual: dict[str, float] | None) -> tuple[int, float, str]:
    """Wait for a process. Kill it if a test hangs or if it uses too much memory.

    Return its status, its CPU seconds, and why it was killed (empty if it was not). Without the
    tests' usual CPU seconds, it is never killed.
    """
    killed, lines, began_cpu = "", 0, 0.0
    minute_cpu, minute = 0.0, time.monotonic()
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        time.sleep(POLL_SECONDS)
        cpu, memory = _usage(pid)
        rows = _read(events)
        if len(rows) != lines:
            lines, began_cpu = len(rows), cpu
        idle = False
        if time.monotonic() > minute + IDLE_SECONDS:
            idle = cpu < minute_cpu + WAKING_SECONDS
            minute_cpu, minute = cpu, time.monotonic()
        if usual is None or killed:
            continue
        test = rows[-1]["test"] if rows else ""
        limit = MORE_SECONDS + TIMES_AS_LONG * usual.get(test, 10.0)
        if memory > MEMORY:
            killed = f"{memory >> 20} MiB of memory"
        elif cpu - began_cpu > limit:
            killed = f"{cpu - began_cpu:.0f} CPU seconds, usually {usual.get(test, 10.0):.1f}"
        elif idle:
            killed = f"idle for {IDLE_SECONDS} s"
        if killed:
            os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the processes it has started
        os.killpg(pid, signal.SIGKILL)
    return status, usage.ru_utime + usage.ru_stime, killed


def _usage(pid: int) -> tuple[float, int]:
    """Return the CPU seconds of a process and its memory in bytes."""
    try:
        times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0, 0
    seconds = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
    return seconds, pages * resource.getpagesize()


def _read(events: Path) -> list[dict[str, Any]]:
    lines = events.read_text().splitlines(keepends=True) if events.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _last_error(output: str) -> str:
    lines = [line for line in output.splitlines() if line.startswith("E ") or "Error" in line]
    return lines[-1].strip()[:300] if lines else output.strip()[-300:]
