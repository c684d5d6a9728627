"""Record and report the programs that JAX compiles for each test.

`pytest --compilations FILE` appends a line for each test to FILE. These commands read such files:

    python -m tests.compilations totals FILE ...
    python -m tests.compilations table [--rows 15] FILE ...
    python -m tests.compilations check FILE ...

- totals: Print the numbers of tests and programs, and the seconds of compilation.
- table: Print the slowest files and the slowest tests.
- check: List the unit tests that compile a program of more than LIMIT operations. If there are
  any, the exit code is 1. Such a test belongs to another kind, for example to `tests/mesh`.

A program counts for every test that requests it, even if it comes from the persistent compilation
cache. The programs of a shared fixture count for the first test that uses the fixture.
"""

import argparse
import functools
import json
import sys
from collections import defaultdict
from collections.abc import Generator, Iterable
from pathlib import Path
from time import perf_counter, process_time  # before tests/guard.py replaces them
from typing import Any

import jax
import pytest
from jax._src import compiler
from jaxlib.mlir import ir

from tests import guard

LIMIT = 2_500  # StableHLO operations; the training step of a small model has more
# The only unit tests that compile a complete training step.
OF_A_COMPLETE_STEP = (
    "tests/test_step.py::test_the_golden_step",
    "tests/test_step.py::test_the_logit_scale_is_capped",
    "tests/test_train.py::test_a_run_leaves_its_numbers_pictures_and_checkpoints",
    "tests/test_train.py::test_a_stopped_and_damaged_run_ends_bit_for_bit_the_same",
)
TESTS = Path(__file__).parent


class Compilations:
    """A pytest plugin that appends the time and the programs of each test to a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._programs: list[dict[str, Any]] = []
        self._traced = 0.0  # seconds spent on tracing and lowering
        compiler.compile_or_get_cached = self._counted(compiler.compile_or_get_cached)
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _counted(self, compile_or_load: Any) -> Any:
        @functools.wraps(compile_or_load)
        def counted(backend: Any, computation: Any, *args: Any, **kwargs: Any) -> Any:
            operations = _operations(computation)
            began = perf_counter()
            program = compile_or_load(backend, computation, *args, **kwargs)
            self._programs.append(
                {
                    "name": str(computation.operation.attributes["sym_name"]).strip('"'),
                    "operations": operations,
                    "seconds": perf_counter() - began,
                }
            )
            return program

        return counted

    def _listen(self, event: str, seconds: float, **_: object) -> None:
        if event.endswith(("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration")):
            self._traced += seconds

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Run a test with its fixtures, then append its line."""
        self._programs, self._traced = [], 0.0
        began, began_cpu = perf_counter(), process_time()
        try:
            return (yield)
        finally:
            row = {
                "test": item.nodeid,
                "seconds": perf_counter() - began,
                "cpu": process_time() - began_cpu,
                "traced": self._traced,
                "programs": self._programs,
            }
            with self._path.open("a") as file:  # a single write, because workers share the file
                file.write(json.dumps(row) + "\n")


def _operations(module: Any) -> int:
    count = 0

    def visit(_: object) -> Any:
        nonlocal count
        count += 1
        return ir.WalkResult.ADVANCE

    module.operation.walk(visit)
    return count


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the rows of files that `pytest --compilations` wrote."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def summary(rows: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return a row per file, slowest first.

    Its columns are file, tests, seconds, CPU seconds, programs, and the seconds of tracing and of
    compilation.
    """
    by_file: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_file[row["test"].partition("::")[0]].append(row)
    table = [
        (
            file,
            len(tests),
            sum(row["seconds"] for row in tests),
            sum(row["cpu"] for row in tests),
            sum(len(row["programs"]) for row in tests),
            sum(row["traced"] for row in tests),
            sum(program["seconds"] for row in tests for program in row["programs"]),
        )
        for file, tests in by_file.items()
    ]
    return sorted(table, key=lambda row: -row[2])


def too_large(rows: Iterable[dict[str, Any]]) -> list[tuple[str, str, int]]:
    """Return (test, program, operations) for each program above LIMIT that a unit test compiles."""
    return [
        (row["test"], program["name"], program["operations"])
        for row in rows
        for program in row["programs"]
        if program["operations"] > LIMIT
        and row["test"] not in OF_A_COMPLETE_STEP
        and guard.is_unit(TESTS.parent / row["test"].partition("::")[0], TESTS)
    ]


def print_table(rows: list[dict[str, Any]], limit: int) -> None:
    """Print the slowest files and tests, at most `limit` of each."""
    table = summary(rows)
    header = ("file", "tests", "seconds", "CPU", "programs", "tracing", "compiling")
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    totals = [sum(row[column] for row in table) for column in range(1, len(header))]
    for file, *numbers in [*table[:limit], ("all", *totals)]:
        print(f"| {file} | " + " | ".join(f"{number:.0f}" for number in numbers) + " |")
    print("\n| test | seconds | CPU | programs | largest program |\n|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -row["seconds"])[:limit]:
        largest = max((program["operations"] for program in row["programs"]), default=0)
        print(
            f"| {row['test']} | {row['seconds']:.1f} | {row['cpu']:.1f} | "
            f"{len(row['programs'])} | {largest} |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("totals", "table", "check"))
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--rows", type=int, default=15, help="maximum number of rows of each table")
    arguments = parser.parse_args()
    rows = read(arguments.files)
    programs = [program for row in rows for program in row["programs"]]
    if arguments.verb == "totals":
        print(
            f"{len(rows)} tests requested {len(programs)} programs; compiling them or reading them "
            f"from the cache took {sum(program['seconds'] for program in programs):.0f} s"
        )
    elif arguments.verb == "table":
        print_table(rows, arguments.rows)
    else:
        large = too_large(rows)
        for test, name, operations in large:
            print(f"{test} compiles {name} of {operations} operations; the limit is {LIMIT}")
        return int(bool(large))
    return 0


if __name__ == "__main__":
    sys.exit(main())
