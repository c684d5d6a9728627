"""Insert deliberate faults into the package, one at a time, and see whether the tests catch them.

    python benchmarks/mutants.py check --checkout DIR
    python benchmarks/mutants.py record --checkout DIR --output map.json [-- PYTEST-ARGS ...]
    python benchmarks/mutants.py run --checkout DIR --map map.json --output result.json
    python benchmarks/mutants.py compare OLD.json NEW.json

The faults are listed in `mutants.toml`.

- check: Find the code of each fault in a checkout, and parse the faulty version.
- record: Run the tests under coverage, and write which of them execute the lines of each fault.
  Code that runs in processes started by a test is not seen.
- run: Insert each fault into a copy of the checkout, and run its tests, quickest first, until one
  fails. A test that also fails without the fault does not count, and the others are tried.
- compare: Print a table of two results. The exit code is 1 if the second misses a fault that the
  first caught.

It needs coverage, pytest, pytest-cov and pytest-xdist.
"""

import argparse
import ast
import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

FAULTS = Path(__file__).with_suffix(".toml")
OLDER = "_at_e1a3b50"  # ends the keys that are tried where the text is not found
MOST = 40  # tests taken of those that only run some function of a module
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# A module that pytest loads: it writes down what becomes of each test.
PLUGIN = """
import json, os

def pytest_runtest_logreport(report):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.environ["MUTANTS_REPORTS"], "a") as file:
            print(json.dumps([report.nodeid, report.outcome, report.duration]), file=file)
"""


# ------------------------------------------------------------------ faults


class Fault(NamedTuple):
    """A fault as located in a checkout. `what` is its name."""

    number: int  # from 1, in the order of the file
    file: str
    function: str
    what: str
    content: str  # of the file with the fault in it
    lines: range  # of the statement that the fault changes
    bodies: set[int]  # lines of the file that are in some function; others run at import


def read_faults(root: Path) -> list[Fault]:
    """Locate all faults in a checkout; end the program at the first that is missing."""
    faults = tomllib.loads(FAULTS.read_text(encoding="utf-8"))["fault"]
    assert len({row["what"] for row in faults}) == len(faults), "two faults have one name"
    found = (locate(root, number, row) for number, row in enumerate(faults, 1))
    return [fault for fault in found if fault]


def locate(root: Path, number: int, row: dict[str, str]) -> Fault | None:
    """Locate a fault by its keys, or those for an older commit; None if that lacked the code."""
    has_function = False
    for ending in ("", OLDER):
        keys = ("file", "function", "old", "new")
        file, function, old, new = (row.get(key + ending, row[key]) for key in keys)
        if not file and not has_function:
            return None
        source = (root / file).read_text(encoding="utf-8") if (root / file).is_file() else ""
        lines, tree = source.splitlines(keepends=True), ast.parse(source)
        first, last = extent(tree, function, len(lines))
        has_function |= last > 0
        inside = "".join(lines[first - 1 : last])
        if inside.count(old) == 1:
            changed = inside.replace(old, new)
            content = "".join([*lines[: first - 1], changed, *lines[last:]])
            ast.parse(content)
            start = first + inside[: inside.index(old)].count("\n")
            around = statement(tree, start, start + old.count("\n"))
            functions = [x for x in ast.walk(tree) if isinstance(x, FUNCTIONS)]
            bodies = {n for x in functions for n in range(x.body[0].lineno, x.end_lineno + 1)}
            return Fault(number, file, function, row["what"], content, around, bodies)
    raise SystemExit(
        f"fault {number} ({row['file']}, {row['function']}: {row['what']}) is not found in "
        f"{root}: its text must occur there exactly once."
    )


def extent(tree: ast.Module, function: str, length: int) -> tuple[int, int]:
    """Return the first and last line of a function or class; an empty range if there is none."""
    if function == "<module>":
        return 1, length
    node: Any = tree
    for name in function.split("."):
        inside = (x for x in ast.walk(node) if isinstance(x, (*FUNCTIONS, ast.ClassDef)))
        node = next((x for x in inside if x.name == name and x is not node), None)
        if node is None:
            return 1, 0
    return node.lineno, node.end_lineno


def statement(tree: ast.Module, first: int, last: int) -> range:
    """Return the lines of the smallest statement around these; of a block, only its head."""
    around = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            end = max(body[0].lineno - 1, node.lineno) if body else node.end_lineno
            if node.lineno <= first and last <= end:
                around.append(range(node.lineno, end + 1))
    return min(around, key=len, default=range(first, last + 1))


# ------------------------------------------------------------------ record


def run_pytest(
    folder: Path, scratch: Path, args: Sequence[str], seconds: float | None = None, **more: str
) -> tuple[int | None, list[list[Any]]]:
    """Run pytest in a checkout; return its exit code, None if it took too long, and the reports:
    test, outcome and seconds of each set-up, call and tear-down."""
    scratch.mkdir(exist_ok=True)
    (scratch / "mutants_plugin.py").write_text(PLUGIN)
    reports = scratch / "reports"
    reports.write_text("")
    unwanted = ("PYTHONPYCACHEPREFIX", "PYTEST_ADDOPTS", "JAX_COMPILATION_CACHE_DIR")
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment |= {"PYTHONPATH": f"{folder}{os.pathsep}{scratch}", "JAX_PLATFORMS": "cpu"}
    environment |= {"MUTANTS_REPORTS": str(reports), **more}
    with (scratch / "output").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "mutants_plugin", *args],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            stdout=output if seconds else None,
            stderr=output if seconds else None,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):  # with all that tests have started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = reports.read_text().splitlines(keepends=True)
    return code, [json.loads(line) for line in lines if line.endswith("\n")]


def record(args: argparse.Namespace) -> None:
    """Write which tests execute the lines of each fault."""
    import coverage

    checkout = args.checkout.resolve()
    faults = read_faults(checkout)
    with tempfile.TemporaryDirectory() as folder:
        settings, kept = Path(folder, "coveragerc"), f"{folder}/coverage"
        settings.write_text("[run]\nbranch = false\nconcurrency = thread\nsource = clip_jax\n")
        how = ("--cov=clip_jax", "--cov-context=test", "--cov-report=", f"--cov-config={settings}")
        options, more = [*how, *args.pytest], {"COVERAGE_FILE": kept, "COVERAGE_CORE": "ctrace"}
        code, reports = run_pytest(checkout, Path(folder), options, **more)
        if code not in (0, 1):
            raise SystemExit(f"pytest ended with exit code {code}; nothing is recorded.")
        data = coverage.CoverageData(kept)
        data.read()
        contexts = {x.file: data.contexts_by_lineno(str(checkout / x.file)) for x in faults}
    seconds: dict[str, float] = defaultdict(float)  # of the tests that passed
    for test, _, took in reports:
        seconds[test] += took
    for test in {test for test, outcome, _ in reports if outcome != "passed"}:
        del seconds[test]
    tests = {x.what: tests_of(x, contexts[x.file], seconds) for x in faults}
    args.output.write_text(json.dumps(tests, indent=1))
    covered = sum(map(bool, tests.values()))
    print(f"{len(seconds)} tests passed; there are some for {covered} of {len(faults)} faults")


def tests_of(fault: Fault, contexts: dict[int, list[str]], seconds: dict[str, float]) -> list[str]:
    """List the tests that may notice a fault: those that run its lines, and behind them the others
    of the module's own file, since what is compiled or cached is run by the first test alone."""
    called, set_up = covering(contexts, fault.lines)
    shared = {file_of(test) for test in set_up} - {file_of(test) for test in called}
    chosen = called | set_up | {test for test in seconds if file_of(test) in shared}
    own = {test for test in seconds if is_mirror(file_of(test), fault.file)}
    if not fault.bodies.issuperset(fault.lines):  # it runs at import
        some = set.union(*covering(contexts, fault.bodies)) & seconds.keys()
        chosen |= own | set(sorted(some, key=seconds.__getitem__)[:MOST])
    parts = (chosen & seconds.keys(), own - chosen)
    return [test for part in parts for test in sorted(part, key=lambda x: (seconds[x], x))]


def covering(contexts: dict[int, list[str]], lines: Collection[int]) -> tuple[set[str], set[str]]:
    """Return the tests that run some of the lines, and those that do so in their set-up alone."""
    hits = {context.rpartition("|") for line in lines for context in contexts.get(line, ())}
    called = {test for test, _, phase in hits if test and phase != "setup"}
    return called, {test for test, _, _ in hits if test} - called


def file_of(test: str) -> str:
    return test.partition("::")[0]


def is_mirror(test_file: str, file: str) -> bool:
    """Return whether a test file, perhaps in the folder of one CI stage, is that of a module."""
    path, parts = Path(file), Path(test_file).parts
    name = path.parent.name if path.stem == "__init__" else path.stem
    return (*path.parts[1:-1], f"test_{name}.py") in (parts[1:], parts[2:])


# ------------------------------------------------------------------ run


def run(args: argparse.Namespace) -> None:
    """Judge each fault, several at a time, each in a copy of the checkout."""
    checkout, tests = args.checkout.resolve(), json.loads(args.map.read_text())
    faults = [x for x in read_faults(checkout) if not args.only or x.number in args.only]
    if lacking := [x.number for x in faults if x.what not in tests]:
        raise SystemExit(f"{args.map} knows nothing of the faults {lacking}: record it anew.")
    results: dict[int, dict[str, Any]] = {}
    copies: queue.SimpleQueue[Path] = queue.SimpleQueue()
    lock = threading.Lock()

    def one(fault: Fault) -> None:
        copy, began = copies.get(), time.monotonic()
        try:
            outcome = judge(fault, copy, tests[fault.what], args)
        finally:
            copies.put(copy)
        names = ("number", "file", "function", "what")
        outcome = {name: getattr(fault, name) for name in names} | outcome
        with lock:
            results[fault.number] = outcome | {"seconds": round(time.monotonic() - began, 1)}
            args.output.write_text(json.dumps([results[x] for x in sorted(results)], indent=1))
            line = f"{fault.number} {fault.file}: {outcome['outcome']}  {outcome['test']}"
            print(f"{len(results)}/{len(faults)}  {line}", flush=True)

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.jobs) as threads:
        for job in range(args.jobs):
            copy = Path(scratch, str(job), "checkout")
            ignore = shutil.ignore_patterns(".git", ".pytest_cache", "__pycache__", ".venv*")
            shutil.copytree(checkout, copy, symlinks=True, ignore=ignore)
            copies.put(copy)
        list(threads.map(one, faults))


def judge(fault: Fault, copy: Path, tests: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Return the outcome of one fault, the test that caught it, and tests that fail without it."""
    dropped: list[str] = []
    passed: set[str] = set()
    limit = 60 * args.minutes
    ends = time.monotonic() + limit

    def tell(outcome: str, test: str = "") -> dict[str, Any]:
        return {"outcome": outcome, "test": test, "dropped": dropped}

    def attempt(names: Sequence[str], seconds: float) -> tuple[int | None, list[list[Any]]]:
        """Run some tests up to the first that fails."""
        listed = copy.parent / "tests.txt"
        listed.write_text("".join(f"{name}\n" for name in names))
        without = ("-p", "no:cacheprovider", "-p", "no:randomly", "-n", "0", "-m", args.mark)
        return run_pytest(
            copy, copy.parent / "scratch", ["-x", "-q", *without, f"@{listed}"], seconds
        )

    while tests:
        with applied(fault, copy):
            code, reports = attempt(tests, max(ends - time.monotonic(), 1))
        failed = next((test for test, outcome, _ in reports if outcome == "failed"), "")
        if code in (None, 0):
            return tell("timeout" if code is None else "not caught")
        if code != 1 or not failed:
            return tell(f"exit code {code}")
        if attempt([failed], limit)[0] == 0:
            return tell("caught", failed)
        dropped.append(failed)
        passed |= {test for test, _, _ in reports} - {failed}
        tests = [test for test in tests if test not in passed and test not in dropped]
    return tell("not caught" if passed else "no tests")


@contextlib.contextmanager
def applied(fault: Fault, copy: Path) -> Generator[None]:
    """Insert a fault into a copy for the duration of a block. Bytecode of the module is deleted
    each time, since Python compares modification times that are too coarse."""
    path = copy / fault.file
    before = path.read_text(encoding="utf-8")

    def put(content: str) -> None:
        path.write_text(content, encoding="utf-8")
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
            compiled.unlink()

    try:
        put(fault.content)
        yield
    finally:
        put(before)


# ------------------------------------------------------------------ compare


def compare(args: argparse.Namespace) -> int:
    """Print both results as a table; return 1 if the new one misses what the old one caught."""
    both = [
        {row["what"]: row for row in json.loads(path.read_text())} for path in (args.old, args.new)
    ]
    rows = sorted((both[0] | both[1]).values(), key=lambda row: row["number"])
    caught, missed = [0, 0], 0
    print("| Fault | File | Function | What | Old | New |\n|---|---|---|---|---|---|")
    for row in rows:
        old, new = (x[row["what"]]["outcome"] if row["what"] in x else "not run" for x in both)
        location = f"`{row['file']}` | `{row['function']}`"
        print(f"| {row['number']} | {location} | {row['what']} | {old} | {new} |")
        caught = [n + (x == "caught") for n, x in zip(caught, (old, new), strict=True)]
        missed += old == "caught" != new
    print(f"\nOf {len(rows)} faults the old tests catch {caught[0]}, the new ones {caught[1]}.")
    print(f"The new ones miss {missed} that the old ones catch.")
    return int(missed > 0)


def main() -> int:
    """Run the subcommand of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    of = {name: verbs.add_parser(name) for name in ("check", "record", "run", "compare")}
    for name in ("check", "record", "run"):
        of[name].add_argument("--checkout", type=Path, required=True, help="source tree to test")
    for name in ("record", "run"):
        of[name].add_argument("--output", type=Path, required=True, help="JSON file to write")
    of["record"].add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    of["run"].add_argument("--map", type=Path, required=True, help="output of `record`")
    of["run"].add_argument("--jobs", type=int, default=2, help="faults to test in parallel")
    of["run"].add_argument(
        "--minutes", type=float, default=5.0, help="time limit for the tests of one fault"
    )
    of["run"].add_argument("--only", type=int, nargs="+", help="numbers of the faults to test")
    of["run"].add_argument(
        "--mark", default="", help="pytest's -m expression; by default all tests run"
    )
    for name in ("old", "new"):
        of["compare"].add_argument(name, type=Path)
    args = parser.parse_args()
    if args.verb == "check":
        count = len(read_faults(args.checkout.resolve()))
        print(f"all {count} faults were located in the checkout, and parse")
        return 0
    return {"record": record, "run": run, "compare": compare}[args.verb](args) or 0


if __name__ == "__main__":
    sys.exit(main())
