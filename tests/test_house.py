"""Tests mirror the package: a file of tests for a file of code, and builders in conftest.py."""

import ast

from tests.conftest import ROOT

OF_THE_REPOSITORY = {"house", "configs", "launch", "launch_scripts", "notebooks", "readme"}
OF_A_ROOM = {"convert/hostile"}  # files that several modules have to refuse
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def test_each_file_of_tests_has_its_file_of_code():
    alone = []
    for path in TESTS:
        room = path.parent.relative_to(ROOT / "tests")
        name = path.stem.removeprefix("test_")
        places = [ROOT / "clip_jax" / room / f"{name}.py", ROOT / "clip_jax" / room / name]
        if room.parts[:1] in (("peers",), ("browser",), ("docs",)) or any(
            place.exists() for place in places
        ):
            continue
        if name != room.name and str(room / name) not in OF_THE_REPOSITORY | OF_A_ROOM:
            alone.append(str(path))
    assert not alone, "no file of this name in clip_jax; move the tests to the one that they test"


def test_no_test_imports_another():
    for path in TESTS:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [x.name for x in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                taken = name.startswith("tests.") and name.rpartition(".")[2].startswith("test_")
                assert not taken, f"{path} imports {name}; what both need belongs into conftest.py"
