"""Mutation testing: insert deliberate faults into the package, one at a time, and run its tests.

    python benchmarks/mutants.py check --checkout DIR
    python benchmarks/mutants.py record --checkout DIR --map MAP [TESTS ...]
    python benchmarks/mutants.py draw --checkout DIR --map MAP --seed 53 --count 300 FAULTS.json
    python benchmarks/mutants.py run --checkout DIR --map MAP --results R.jsonl [FAULTS.json]
    python benchmarks/mutants.py table --checkout DIR --results R.jsonl [FAULTS.json]
    python benchmarks/mutants.py compare OLD.jsonl NEW.jsonl

DIR is a checkout of this repository. The commands read the faults from FAULTS.json, which `draw`
writes, or else from `mutants.toml`, which people have written.

- check: Check that the code of each fault is in the checkout, and that the faulty version parses.
- record: Run the unit tests and tests/mesh under coverage, and write to the folder MAP which test
  executes which statement. A test file that has not changed since the last time is not run again.
  Code that a test runs in another process is not recorded.
- draw: Draw faults at random, by the rules of `fault_rules.py`, in statements that a test executes.
  Each folder and each top-level module of the package gets a share. Results of tests do not matter.
- run: For each fault, run the tests that execute its statement until one fails. Tests of the
  module's own test file and quick tests come first. A test that also fails without the fault does
  not count. Each result is appended to R.jsonl at once, so an interrupted run can be resumed.
- table: Print the results by folder and by rule, and the faults that survived. Those in
  `equivalent_mutants.toml` are only counted.
- compare: Compare two results. The exit code is 1 if NEW.jsonl misses a fault that OLD.jsonl has
  caught.

The checkout must not change while a command runs. Requires coverage and the requirements of the
tests.
"""

import argparse
import ast
import collections
import difflib
import hashlib
import json
import math
import os
import random
import struct
import sys
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fault_rules
import fork_server
from fault_rules import Candidate, File, Statement

LISTED = Path(__file__).with_suffix(".toml")
EQUIVALENT = LISTED.with_name("equivalent_mutants.toml")
OLDER = "_at_e1a3b50"  # suffix of keys for an older commit, used if the current code is missing
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# CPU seconds of the tests in the first processes; one more process runs all other tests.
STAGES = (8.0, 40.0)
OUTCOMES = ("caught", "timed out", "survived", "survived (cap)", "no tests")
# Outcomes of a fault by those of the last process that ran its tests; all others mean "caught".
OUTCOME_OF = {"passed": "survived (cap)", "cap": "survived (cap)", "timed out": "timed out"}
LEVELS = ("statement", "function", "file")  # code for which tests are searched, in this order
MODULES = "modules.json"  # file in MAP: libraries that the tests import


# ------------------------------------------------------------------ faults


class Fault(NamedTuple):
    """A fault located in a checkout."""

    id: str
    file: str
    function: str
    what: str  # a description, or the rule by which it was drawn
    content: str  # the file's text with the fault
    statements: list[Statement]  # those that the fault changes


def read_faults(root: Path, path: Path | None) -> list[Fault]:
    """Locate the faults in a checkout.

    If the code of a fault in `mutants.toml` is missing, the program ends. A drawn fault whose code
    has changed is omitted, with a message.
    """
    if path is None:
        rows = tomllib.loads(LISTED.read_text(encoding="utf-8"))["fault"]
        assert len({row["what"] for row in rows}) == len(rows), (
            "two faults have the same description"
        )
        faults = [_listed(root, number, row) for number, row in enumerate(rows, 1)]
        return [fault for fault in faults if fault]
    located = []
    for row in json.loads(path.read_text()):
        if fault := _drawn(root, row):
            located.append(fault)
        else:
            print(f"{row['id']} {row['file']}, {row['function']}: its code has changed")
    return located


def _listed(root: Path, number: int, row: dict[str, str]) -> Fault | None:
    """Locate a fault of `mutants.toml`, also in an older commit; None if that has no such code."""
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
            end = start + old.count("\n")
            around = _around(fault_rules.statements(File(source)), start, end)
            return Fault(str(number), file, function, row["what"], content, around)
    raise SystemExit(
        f"Fault {number} ({row['file']}, {row['function']}: {row['what']}) has no unique text in "
        f"{root}. Its text `old` must occur in the function exactly once."
    )


def extent(tree: ast.Module, function: str, length: int) -> tuple[int, int]:
    """Return the first and last line of a function or class; (1, 0) if there is none."""
    if function == "<module>":
        return 1, length
    node: Any = tree
    for name in function.split("."):
        inside = (x for x in ast.walk(node) if isinstance(x, (*FUNCTIONS, ast.ClassDef)))
        node = next((x for x in inside if x.name == name and x is not node), None)
        if node is None:
            return 1, 0
    return node.lineno, node.end_lineno


def _around(statements: Sequence[Statement], first: int, last: int) -> list[Statement]:
    """Return the smallest statement that contains the lines, or all that contain some of them."""
    around = [x for x in statements if x.first <= first and last <= x.last]
    if around:
        return [min(around, key=lambda x: x.last - x.first)]
    return [x for x in statements if x.first <= last and first <= x.last]


def _drawn(root: Path, row: dict[str, Any]) -> Fault | None:
    """Locate a drawn fault by the text of its statement; None if this has changed."""
    path = root / row["file"]
    if not path.is_file():
        return None
    file = File(path.read_text(encoding="utf-8"))
    same = _same(file, row["function"], row["statement"].encode())
    if len(same) <= row["nth"]:
        return None
    statement = same[row["nth"]]
    start = statement.start + row["start"]
    new = row["new"].encode()
    candidate = Candidate(row["rule"], statement, start, start + len(row["old"].encode()), new)
    content = fault_rules.changed(file, candidate)
    if content is None:
        return None
    return Fault(row["id"], row["file"], row["function"], row["rule"], content, [statement])


def _same(file: File, function: str, text: bytes) -> list[Statement]:
    """List the statements of a function that have a text."""
    return [
        x
        for x in fault_rules.statements(file)
        if x.function == function and file.source[x.start : x.end] == text
    ]


def difference(root: Path, fault: Fault) -> str:
    """Return the lines that a fault removes and adds, as in a diff."""
    before = (root / fault.file).read_text(encoding="utf-8").splitlines()
    lines = difflib.unified_diff(before, fault.content.splitlines(), n=0, lineterm="")
    return "\n".join(x for x in lines if not x.startswith(("---", "+++", "@@")) and x[1:].strip())


# ------------------------------------------------------------------ record


def _key(file: File, statement: Statement) -> str:
    return _digest(file.source[statement.start : statement.end])


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()[:10]


def record(args: argparse.Namespace) -> None:
    """Write which test executes which statement, in a file for each test file."""
    checkout, folder = args.checkout.resolve(), args.map
    folder.mkdir(parents=True, exist_ok=True)
    modules = _modules(folder)
    fork_server.preload(modules)
    for path in folder.glob("tests+*.json"):
        if not (checkout / json.loads(path.read_text())["file"]).exists():
            path.unlink()
    not_recorded = []
    for test_file in _test_files(checkout, args.tests):
        path = folder / f"{test_file.removesuffix('.py').replace('/', '+')}.json"
        digest = _digest((checkout / test_file).read_bytes())
        if path.exists() and json.loads(path.read_text())["digest"] == digest and not args.again:
            continue
        began = time.monotonic()
        try:
            recorded = fork_server.record(checkout, test_file, args.cache.resolve())
        except fork_server.RecordingError as error:
            print(error, flush=True)
            not_recorded.append(test_file)
            continue
        tests = list(recorded["seconds"])
        hits = _hits(checkout, recorded["lines"], {test: i for i, test in enumerate(tests)})
        row = {
            "file": test_file,
            "digest": digest,
            "tests": list(recorded["seconds"].items()),
            "failed": recorded["failed"],
            "hits": hits,
        }
        path.write_text(json.dumps(row))
        modules += [name for name in recorded["modules"] if name not in {*modules}]
        (folder / MODULES).write_text(json.dumps(modules))
        failed = f", {len(recorded['failed'])} failed" if recorded["failed"] else ""
        took = time.monotonic() - began
        print(f"{test_file}: {len(tests)} tests passed{failed}; {took:.0f} s", flush=True)
    if not_recorded:
        raise SystemExit(f"Not recorded: {', '.join(not_recorded)}; run the command again.")


def _test_files(checkout: Path, chosen: Sequence[str]) -> list[str]:
    """List the chosen test files; by default, those of the unit tests and of tests/mesh."""
    others = ("contract", "workflow", "reference", "programs")
    files = sorted(str(x.relative_to(checkout)) for x in (checkout / "tests").rglob("test_*.py"))
    if chosen:
        return [x for x in files if any(x == y or x.startswith(f"{y}/") for y in chosen)]
    left_out = ("tests/test_house.py", *(f"tests/{name}/" for name in others))
    return [x for x in files if not x.startswith(left_out)]


def _hits(
    checkout: Path, lines: dict[str, dict[str, list[str]]], numbers: dict[str, int]
) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Return two sets of tests for each file, function and statement: those that execute it in
    their call, and those that do so in their set-up or teardown. A set is a hexadecimal number with
    a bit for each test."""
    result: dict[str, dict[str, dict[str, list[str]]]] = {}
    for name, by_line in lines.items():
        file = File((checkout / name).read_text(encoding="utf-8"))
        functions: dict[str, dict[str, list[int]]] = defaultdict(dict)
        for statement in fault_rules.statements(file):
            called = set_up = 0
            for line in range(statement.first, statement.last + 1):
                for context in by_line.get(str(line), ()):
                    phase, _, test = context.partition("|")
                    if test in numbers:
                        bit = 1 << numbers[test]
                        called |= bit if phase == "call" else 0
                        set_up |= bit if phase != "call" else 0
            if called or set_up:
                bits = functions[statement.function].setdefault(_key(file, statement), [0, 0])
                bits[0] |= called
                bits[1] |= set_up
        result[name] = {
            function: {key: [f"{x:x}" for x in bits] for key, bits in keys.items()}
            for function, keys in functions.items()
        }
    return result


def _modules(folder: Path) -> list[str]:
    path = folder / MODULES
    return json.loads(path.read_text()) if path.exists() else ["jax", "flax", "optax", "pytest"]


class Recorded(NamedTuple):
    """What `record` has written for one test file."""

    file: str
    tests: list[tuple[str, float]]  # those that passed, with their CPU seconds
    hits: dict[str, dict[str, dict[str, list[str]]]]


def read_map(folder: Path) -> list[Recorded]:
    """Read the files that `record` has written."""
    rows = (json.loads(path.read_text()) for path in sorted(folder.glob("tests+*.json")))
    return [Recorded(row["file"], [*map(tuple, row["tests"])], row["hits"]) for row in rows]


# ------------------------------------------------------------------ draw


def draw(args: argparse.Namespace) -> None:
    """Draw faults from all folders and top-level modules of the package, and write them."""
    checkout, recorded = args.checkout.resolve(), read_map(args.map)
    strata: dict[str, list[tuple[str, File, Candidate]]] = defaultdict(list)
    sizes: collections.Counter[str] = collections.Counter()  # numbers of executed statements
    for path in sorted((checkout / "clip_jax").rglob("*.py")):
        name = str(path.relative_to(checkout))
        stratum = str(Path(name).parent) if path.parent.name != "clip_jax" else name
        file = File(path.read_text(encoding="utf-8"))
        executed = _executed(recorded, name)
        if not executed:
            continue
        for candidate in fault_rules.candidates(file):
            statement = candidate.statement
            if statement.at_import or (statement.function, _key(file, statement)) in executed:
                strata[stratum].append((name, file, candidate))
        sizes[stratum] += len({x.statement for _, file_, x in strata[stratum] if file_ is file})
    chosen = [args.only] if args.only else sorted(strata)
    counts = _shares({name: sizes[name] for name in chosen}, args.count)
    rows = [row for name in chosen for row in _draw(args.seed, name, strata[name], counts[name])]
    random.Random(args.seed).shuffle(rows)  # so that the first results come from all folders
    args.faults.write_text(json.dumps(rows, indent=1))
    total = sum(map(len, strata.values()))
    print(f"Drew {len(rows)} of {total} faults in {len(chosen)} folders and top-level modules.")


def _executed(recorded: Sequence[Recorded], name: str) -> set[tuple[str, str]]:
    """Return (function, key) of each statement of a file that a test executes."""
    return {
        (function, key)
        for row in recorded
        for function, keys in row.hits.get(name, {}).items()
        for key in keys
    }


def _shares(sizes: dict[str, int], count: int) -> dict[str, int]:
    """Divide a count in proportion to the square roots of sizes, with a minimum of one each.

    The largest remainders are rounded up.
    """
    roots = {name: math.sqrt(size) for name, size in sizes.items()}
    exact = {name: count * x / sum(roots.values()) for name, x in roots.items()}
    shares = {name: max(int(x), 1) for name, x in exact.items()}
    for name in sorted(exact, key=lambda name: shares[name] - exact[name]):
        shares[name] += sum(shares.values()) < count
    return shares


def _draw(
    seed: int, stratum: str, rows: Sequence[tuple[str, File, Candidate]], count: int
) -> Iterator[dict[str, Any]]:
    """Draw faults of one folder or top-level module, at most one for each statement.

    The rule is drawn first, with a weight of the square root of its number of faults.
    """
    rng = random.Random(f"{seed} {stratum}")
    by_rule: dict[str, list[tuple[str, File, Candidate]]] = defaultdict(list)
    for row in rows:
        by_rule[row[2].rule].append(row)
    taken: set[tuple[str, Statement]] = set()
    while count and by_rule:
        rules = sorted(by_rule)
        (rule,) = rng.choices(rules, [math.sqrt(len(by_rule[x])) for x in rules])
        name, file, candidate = by_rule[rule].pop(rng.randrange(len(by_rule[rule])))
        if not by_rule[rule]:
            del by_rule[rule]
        statement = candidate.statement
        if (name, statement) in taken or fault_rules.changed(file, candidate) is None:
            continue
        taken.add((name, statement))
        count -= 1
        text = file.source[statement.start : statement.end]
        row = {
            "rule": rule,
            "file": name,
            "function": statement.function,
            "statement": text.decode(),
            "nth": _same(file, statement.function, text).index(statement),
            "start": candidate.start - statement.start,
            "old": file.source[candidate.start : candidate.end].decode(),
            "new": candidate.new.decode(),
        }
        yield {"id": _digest(json.dumps(row).encode()), **row}


# ------------------------------------------------------------------ run


def groups_of(
    recorded: Sequence[Recorded], fault: Fault, file: File
) -> list[list[tuple[str, float]]]:
    """List the tests that may catch a fault, grouped by test file.

    The tests that execute its statement come first. The other tests of the same files follow: code
    that is compiled or cached is executed by the first test only, but others may also depend on it.
    """
    direct: list[tuple[float, list[tuple[str, float]]]] = []
    others: list[tuple[float, list[tuple[str, float]]]] = []
    by_level = (_executing(recorded, fault, file, level) for level in LEVELS)
    executing = next(filter(any, by_level), [0] * len(recorded))
    for row, bits in zip(recorded, executing, strict=True):
        is_own = is_mirror(row.file, fault.file)
        chosen = [x for i, x in enumerate(row.tests) if bits >> i & 1]
        rest = [x for i, x in enumerate(row.tests) if not bits >> i & 1]
        for groups, tests in ((direct, chosen), (others, rest if chosen or is_own else [])):
            if tests:
                cost = (1 + sum(seconds for _, seconds in tests)) * (0.1 if is_own else 1)
                groups.append((cost, sorted(tests, key=lambda x: x[1])))
    return [tests for groups in (direct, others) for _, tests in sorted(groups)]


def _executing(recorded: Sequence[Recorded], fault: Fault, file: File, level: str) -> list[int]:
    """Return for each test file the tests that execute the fault's statement, as bits.

    The other levels take its entire function or class, or its file, instead of the statement: for
    statements that run at import, or that have changed since MAP was recorded.
    """
    keys = {(x.function, _key(file, x)) for x in fault.statements if not x.at_import}
    names = {x.function for x in fault.statements}
    result = []
    for row in recorded:
        tests = 0
        for function, sets in row.hits.get(fault.file, {}).items():
            is_inside = any(function == x or function.startswith(f"{x}.") for x in names)
            for key, (called, set_up) in sets.items():
                is_statement = (function, key) in keys
                if {"statement": is_statement, "function": is_inside, "file": True}[level]:
                    tests |= int(called, 16) | int(set_up, 16)
        result.append(tests)
    return result


def is_mirror(test_file: str, file: str) -> bool:
    """Return whether a test file is the module's own, in tests/ or a folder such as tests/mesh."""
    path, parts = Path(file), Path(test_file).parts
    name = path.parent.name if path.stem == "__init__" else path.stem
    return (*path.parts[1:-1], f"test_{name}.py") in (parts[1:], parts[2:])


def _stages(groups: Sequence[Sequence[tuple[str, float]]]) -> Iterator[dict[str, float]]:
    """Yield the tests of each process, with their usual CPU seconds."""
    limits, stage, total = iter(STAGES), {}, 0.0
    limit = next(limits)
    for group in groups:
        cost = 1 + sum(seconds for _, seconds in group)
        if stage and total + cost > limit:
            yield stage
            stage, total, limit = {}, 0.0, next(limits, math.inf)
        stage |= dict(group)
        total += cost
    if stage:
        yield stage


class Judge:
    """Judges faults by running their tests."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._checkout = args.checkout.resolve()
        self._cache = args.cache.resolve()
        self._cap = args.cpu_seconds
        self._sound: dict[str, bool] = {}  # whether a test passes alone, without a fault

    def __call__(self, fault: Fault, groups: Sequence[list[tuple[str, float]]]) -> dict[str, Any]:
        """Return the outcome of a fault, with the test that decided it."""
        used, dropped, stages = 0.0, set(), [*_stages(groups)]
        change = (fault.file, fault.content)
        while stages:
            tests = {test: x for test, x in stages.pop(0).items() if test not in dropped}
            if not tests:
                continue
            left = self._cap - used
            ended = fork_server.run_tests(self._checkout, tests, left, self._cache, change)
            used += ended.cpu
            if ended.outcome == "failed" and not self._is_sound(ended.test):
                dropped |= {ended.test, *ended.passed}
                stages.insert(0, tests)
                continue
            if ended.outcome == "passed" and (used < self._cap or not stages):
                continue
            outcome = OUTCOME_OF.get(ended.outcome, "caught")
            return self._row(outcome, ended.test, ended.message, used, dropped)
        return self._row("survived" if groups else "no tests", "", "", used, dropped)

    def _row(
        self, outcome: str, test: str, message: str, cpu: float, dropped: set[str]
    ) -> dict[str, Any]:
        unsound = [test for test in dropped if not self._sound.get(test, True)]
        decided = {"outcome": outcome, "test": test, "message": message}
        return decided | {"cpu": round(cpu, 1), "unsound": unsound}

    def _is_sound(self, test: str) -> bool:
        """Return whether a test passes without a fault."""
        if "::" not in test:  # a test file that cannot be imported because of the fault
            return True
        if test not in self._sound:
            ended = fork_server.run_tests(self._checkout, {test: 60.0}, 600, self._cache)
            self._sound[test] = ended.outcome == "passed"
        return self._sound[test]


def run(args: argparse.Namespace) -> None:
    """Judge each fault that has no result yet, in several processes."""
    checkout, recorded = args.checkout.resolve(), read_map(args.map)
    done = {} if not args.results.exists() else read_results(args.results)
    plans = []
    for fault in read_faults(checkout, args.faults):
        before = done.get(fault.id, {}).get("outcome", "")
        if (before and before not in args.again) or (args.only and fault.id not in args.only):
            continue
        file = File((checkout / fault.file).read_text(encoding="utf-8"))
        plans.append((fault, groups_of(recorded, fault, file)))
    del recorded
    fork_server.preload(_modules(args.map))
    tickets, tickets_in = os.pipe()
    os.write(tickets_in, b"".join(struct.pack("<i", i) for i in range(len(plans))))
    os.close(tickets_in)
    children = []
    for _ in range(args.jobs):
        if not (pid := os.fork()):
            judge = Judge(args)
            while ticket := os.read(tickets, 4):
                number = struct.unpack("<i", ticket)[0]
                _judge(judge, *plans[number], args.results, f"{number + 1}/{len(plans)}")
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def _judge(
    judge: Judge, fault: Fault, groups: Sequence[list[tuple[str, float]]], results: Path, at: str
) -> None:
    """Judge a fault, and append the result to a file."""
    began = time.monotonic()
    row = {name: getattr(fault, name) for name in ("id", "file", "function", "what")}
    row |= judge(fault, groups) | {"seconds": round(time.monotonic() - began, 1)}
    with results.open("a") as file:  # a single write, because processes share the file
        file.write(json.dumps(row) + "\n")
    line = f"{fault.id} {fault.file}, {fault.function} ({fault.what}): {row['outcome']}"
    print(f"{at}  {line}  {row['test']}  {row['cpu']} CPU s", flush=True)


def read_results(path: Path) -> dict[str, dict[str, Any]]:
    """Read results, by the ids of the faults. The last result of a fault counts."""
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}


# ------------------------------------------------------------------ table, compare


def table(args: argparse.Namespace) -> None:
    """Print the results by folder and rule, and the survivors that are not known as equivalent."""
    checkout = args.checkout.resolve()
    results = read_results(args.results)
    faults = {fault.id: fault for fault in read_faults(checkout, args.faults)}
    explained = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.exists() else {}
    equivalent = {row["id"] for row in explained.get("fault", ())}
    rows = [row for id_, row in results.items() if id_ in faults]
    for title, of in (("folder", _folder), ("rule", lambda row: row["what"])):
        if title == "rule" and args.faults is None:
            break
        header = (title, "faults", *OUTCOMES, "equivalent", "survive, not equivalent")
        print("| " + " | ".join(header) + " |\n" + "|---" * len(header) + "|")
        for name in [*sorted({of(row) for row in rows}), "all"]:
            part = [row for row in rows if name in (of(row), "all")]
            counts = collections.Counter(row["outcome"] for row in part)
            survived = [row for row in part if row["outcome"].startswith("survived")]
            same = sum(row["id"] in equivalent for row in survived)
            numbers = (len(part), *(counts[x] for x in OUTCOMES), same, len(survived) - same)
            print(f"| {name} | " + " | ".join(map(str, numbers)) + " |")
        print()
    print(f"{len(rows)} of {len(faults)} faults have a result.\n")
    for row in rows:
        if row["outcome"] not in ("caught", "timed out") and row["id"] not in equivalent:
            fault = faults[row["id"]]
            print(f"{fault.id}  {fault.file}, {fault.function} ({fault.what}): {row['outcome']}")
            print(difference(checkout, fault) + "\n")


def _folder(row: dict[str, Any]) -> str:
    path = Path(row["file"])
    return str(path.parent if len(path.parts) > 2 else path)


def compare(args: argparse.Namespace) -> int:
    """Print two results as a table; return 1 if the new one misses what the old one caught."""
    both = [
        {row["what"]: row for row in read_results(path).values()} for path in (args.old, args.new)
    ]
    rows = sorted((both[0] | both[1]).values(), key=lambda row: int(row["id"]))
    caught, missed = [0, 0], 0
    print("| Fault | File | Function | What | Old | New |\n|---|---|---|---|---|---|")
    for row in rows:
        old, new = (x[row["what"]]["outcome"] if row["what"] in x else "not run" for x in both)
        location = f"`{row['file']}` | `{row['function']}`"
        print(f"| {row['id']} | {location} | {row['what']} | {old} | {new} |")
        caught = [n + (x == "caught") for n, x in zip(caught, (old, new), strict=True)]
        missed += old == "caught" != new
    print(f"\nOf {len(rows)} faults, the old tests catch {caught[0]} and the new ones {caught[1]}.")
    print(f"The new tests miss {missed} faults that the old ones catch.")
    return int(missed > 0)


def main() -> int:
    """Run the subcommand of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    commands = {"check": check, "record": record, "draw": draw, "run": run, "table": table}
    of = {name: verbs.add_parser(name) for name in (*commands, "compare")}
    for name in commands:
        of[name].add_argument("--checkout", type=Path, required=True, help="checkout to test")
    for name in ("record", "draw", "run"):
        of[name].add_argument("--map", type=Path, required=True, help="folder that `record` writes")
    for name in ("record", "run"):
        of[name].add_argument(
            "--cache", type=Path, default=Path("compiled"), help="folder of compiled programs"
        )
    of["record"].add_argument("tests", nargs="*", help="test files and folders; default: all")
    of["record"].add_argument("--again", action="store_true", help="also record unchanged files")
    of["draw"].add_argument("--seed", type=int, required=True)
    of["draw"].add_argument("--count", type=int, required=True, help="number of faults")
    of["draw"].add_argument("--only", help="one folder or top-level module, such as clip_jax/evals")
    for name in ("check", "draw", "run", "table"):
        number = "?" if name != "draw" else None
        of[name].add_argument("faults", type=Path, nargs=number, help="JSON file of drawn faults")
    for name in ("run", "table"):
        of[name].add_argument(
            "--results", type=Path, required=True, help="file of results, as JSON lines"
        )
    of["run"].add_argument("--jobs", type=int, default=1, help="faults to test in parallel")
    of["run"].add_argument(
        "--cpu-seconds", type=float, default=150.0, help="CPU time limit per fault"
    )
    of["run"].add_argument("--only", nargs="+", help="ids of the faults to test")
    of["run"].add_argument(
        "--again",
        nargs="+",
        default=(),
        help="test faults with these outcomes again, such as survived",
    )
    for name in ("old", "new"):
        of["compare"].add_argument(name, type=Path)
    args = parser.parse_args()
    return {**commands, "compare": compare}[args.verb](args) or 0


def check(args: argparse.Namespace) -> None:
    """Locate all faults."""
    count = len(read_faults(args.checkout.resolve(), args.faults))
    print(f"All {count} faults are in the checkout, and parse.")


if __name__ == "__main__":
    sys.exit(main())
