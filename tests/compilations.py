"""What JAX compiles for each test: `pytest --compilations FILE` writes it. Of such files

    python -m tests.compilations totals FILE ...
    python -m tests.compilations table [--rows 15] FILE ...
    python -m tests.compilations check FILE ...

print the totals, the slowest files and tests, and the unit tests that compile a program of more
than LIMIT operations, with which `check` ends in exit code 1: they belong to a kind of tests of
their own, such as `tests/mesh`. A program counts where a test asks for it, even if the cache of
compiled programs has it; a fixture's counts for the first test that needs it.
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

LIMIT = 2_500  # operations of StableHLO; a small model's training step has more
# The unit tests of a complete step: its numbers, and a run that trains, stops and resumes.
OF_A_COMPLETE_STEP = (
    "tests/test_step.py::test_the_golden_step",
    "tests/test_step.py::test_the_logit_scale_is_capped",
    "tests/test_train.py::test_a_run_leaves_its_numbers_pictures_and_checkpoints",
    "tests/test_train.py::test_a_stopped_and_damaged_run_ends_bit_for_bit_the_same",
)
TESTS = Path(__file__).parent


class Compilations:
    """A plugin that appends to a file, for each test, its seconds and its programs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._programs: list[dict[str, Any]] = []
        self._traced = 0.0  # seconds of tracing and lowering
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
        """Write the test's line once its fixtures have ended."""
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
            with self._path.open("a") as file:  # one write: workers share the file
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
    """Return the lines of files that `--compilations` wrote."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def summary(rows: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Return file, tests, seconds, CPU seconds, programs, seconds of tracing and of compilation."""
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
    """Return unit tests with a program above LIMIT: test, the program's name, operations."""
    return [
        (row["test"], program["name"], program["operations"])
        for row in rows
        for program in row["programs"]
        if program["operations"] > LIMIT
        and row["test"] not in OF_A_COMPLETE_STEP
        and guard.is_unit(TESTS.parent / row["test"].partition("::")[0], TESTS)
    ]


def print_table(rows: list[dict[str, Any]], most: int) -> None:
    """Print the slowest files and the slowest tests."""
    table = summary(rows)
    header = ("file", "tests", "seconds", "CPU", "programs", "tracing", "compiling")
    print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
    totals = [sum(row[column] for row in table) for column in range(1, len(header))]
    for file, *numbers in [*table[:most], ("all", *totals)]:
        print(f"| {file} | " + " | ".join(f"{number:.0f}" for number in numbers) + " |")
    print("\n| test | seconds | CPU | programs | largest program |\n|---|---|---|---|---|")
    for row in sorted(rows, key=lambda row: -row["seconds"])[:most]:
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
    parser.add_argument("--rows", type=int, default=15, help="rows of each table")
    arguments = parser.parse_args()
    rows = read(arguments.files)
    programs = [program for row in rows for program in row["programs"]]
    if arguments.verb == "totals":
        print(
            f"{len(rows)} tests asked for {len(programs)} programs, whose compilation or reading "
            f"took {sum(program['seconds'] for program in programs):.0f} s"
        )
    elif arguments.verb == "table":
        print_table(rows, arguments.rows)
    else:
        large = too_large(rows)
        for test, name, operations in large:
            print(f"{test} compiles {name} of {operations} operations; {LIMIT} are allowed")
        return int(bool(large))
    return 0


if __name__ == "__main__":
    sys.exit(main())
