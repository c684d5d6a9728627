"""Rules for the tests and the package as a whole: where files stand, what code may call."""

import re
import tomllib

from tests import guard
from tests.conftest import ROOT

# Tests of the repository, and of files that several modules have to refuse.
WITHOUT_A_MODULE = {"house", "configs", "launch", "convert/hostile"}
PACKAGE = ROOT / "clip_jax"
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))


def test_each_file_of_unit_tests_has_its_file_of_code():
    for path in TESTS:
        if not guard.is_unit(path, ROOT / "tests"):
            continue
        name = path.relative_to(ROOT / "tests").with_suffix("")
        name = name.with_name(name.name.removeprefix("test_"))
        module = ROOT / "clip_jax" / name
        is_named = name.name == name.parent.name or str(name) in WITHOUT_A_MODULE
        assert is_named or module.is_dir() or module.with_suffix(".py").exists(), (
            f"{path}: no file of this name in clip_jax; move the tests to the one that they test"
        )


def test_no_test_imports_another():
    for path in TESTS:
        imports = re.findall(r"^ *(?:from|import) tests\b.*\btest_\w+", path.read_text(), re.M)
        assert not imports, f"{path}: {imports}; what both need belongs into conftest.py"


def test_ci_runs_every_folder_that_the_readmes_command_leaves_out():
    ini = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    folders = [name for name in ini["norecursedirs"] if name != ".*"]
    assert sorted(folders) == sorted(guard.ELSEWHERE)
    lines = [x.split("#")[0] for x in (ROOT / ".ci/run").read_text().splitlines()]
    for folder in folders:
        called = re.compile(rf"\bpytest\b.* tests/{folder}( |;|$)")
        assert any(called.search(line) for line in lines), f"no stage runs tests/{folder}"
    # By a marker of our own, every stage could leave a test out.
    assert "--strict-markers" in ini["addopts"]
    assert not ini.get("markers")


def test_the_wheel_has_every_package():
    """Where one is missing here, an installed command fails to import it."""
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")]
    assert setuptools["packages"] == sorted(
        [".".join(folder.parts) for folder in folders] + ["clip_jax.configs"]
    )
    assert {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")} == set(folders)


def test_the_package_reads_time_in_its_clock_alone():
    pattern = re.compile(r"^ *(import|from) time\b", re.M)
    readers = [
        path for path in (ROOT / "clip_jax").rglob("*.py") if pattern.search(path.read_text())
    ]
    assert readers == [ROOT / "clip_jax/clock.py"], "import `time`; they should take a `Clock`"


def test_there_are_at_most_ten_workflows():
    files = (ROOT / "tests/workflow").rglob("test_*.py")
    code = "".join(path.read_text() for path in files)
    assert "parametrize" not in code  # or one function would be several
    assert code.count("\ndef test_") <= 10
