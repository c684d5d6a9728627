"""Rules for the tests and the package as a whole: where files stand, what code may call."""

import ast
import math
import re
import tomllib
from collections.abc import Iterator

from tests import guard
from tests.conftest import ROOT

OF_THE_REPOSITORY = {"house", "configs", "launch"}
OF_A_FOLDER = {"convert/hostile"}  # files that several modules have to refuse
MARKS = {"filterwarnings", "parametrize", "skip", "skipif", "usefixtures", "xfail"}
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]


def imports(tree: ast.AST) -> Iterator[str]:
    """The names of all modules that are imported, and of what is taken from them."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{x.name}" for x in node.names)
        elif isinstance(node, ast.Import):
            yield from (x.name for x in node.names)


def test_each_file_of_unit_tests_has_its_file_of_code():
    alone = []
    for path in TESTS:
        if not guard.is_unit(path, ROOT / "tests"):
            continue
        folder = path.parent.relative_to(ROOT / "tests")
        name = path.stem.removeprefix("test_")
        places = [ROOT / "clip_jax" / folder / f"{name}.py", ROOT / "clip_jax" / folder / name]
        named = name == folder.name or str(folder / name) in OF_THE_REPOSITORY | OF_A_FOLDER
        if not named and not any(place.exists() for place in places):
            alone.append(str(path))
    assert not alone, "no file of this name in clip_jax; move the tests to the one that they test"


def test_no_test_imports_another():
    for path in TESTS:
        for name in imports(ast.parse(path.read_text())):
            is_test = re.fullmatch(r"tests\.(.+\.)?test_\w+", name)
            assert not is_test, f"{path} imports {name}; what both need belongs into conftest.py"


def test_no_test_has_a_marker_of_its_own():
    """Or it could be left out by all stages of CI."""
    assert not SETTINGS.get("markers")
    for path in (ROOT / "tests").rglob("*.py"):
        used = set(re.findall(r"pytest\.mark\.(\w+)", path.read_text()))
        assert used <= MARKS, f"{path}: {used - MARKS}"


def test_ci_runs_every_folder_that_the_readmes_command_leaves_out():
    folders = [name for name in SETTINGS["norecursedirs"] if name != ".*"]
    assert sorted(folders) == sorted(guard.ELSEWHERE)
    lines = [x.split("#")[0] for x in (ROOT / ".ci/run").read_text().splitlines()]
    for folder in folders:
        called = re.compile(rf"\bpytest\b.* tests/{folder}( |;|$)")
        assert any(called.search(line) for line in lines), f"no stage runs tests/{folder}"


def test_the_package_reads_time_in_its_clock_alone():
    for path in (ROOT / "clip_jax").rglob("*.py"):
        names = set(imports(ast.parse(path.read_text())))
        is_clock = path == ROOT / "clip_jax/clock.py"
        assert ("time" in names) == is_clock, f"{path} imports `time`; it should take a `Clock`"


def test_there_are_at_most_ten_workflows():
    count = 0
    for path in (ROOT / "tests/workflow").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                cases = [x.args[1] for x in node.decorator_list if isinstance(x, ast.Call)]
                count += math.prod(len(x.elts) for x in cases if isinstance(x, ast.List))
    assert count <= 10
