"""Rules for the tests and the package as a whole: where files stand, what code may call."""

import ast
import re
import runpy
import tomllib
from collections import Counter

from tests import guard, words
from tests.conftest import ROOT

# Tests of the repository, of files that several modules have to refuse, and of their choices.
WITHOUT_A_MODULE = {
    *("house", "configs", "launch", "choices", "type_checks", "stored_artefacts"),
    "convert/hostile",
}
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
        called = re.compile(rf"\b(pytest|workflow)\b.* tests/{folder}( |;|$)")
        assert any(called.search(line) for line in lines), f"no stage runs tests/{folder}"
    # By a marker of our own, every stage could leave a test out.
    assert "--strict-markers" in ini["addopts"]
    assert not ini.get("markers")


def test_ci_names_files_that_exist_and_describes_and_times_each_stage():
    script = (ROOT / ".ci/run").read_text()
    paths = set(re.findall(r"tests/[\w/.]+", script))
    assert {"tests/test_house.py", "tests/mesh"} <= paths
    assert not [path for path in paths if not (ROOT / path).exists()]
    stages = re.findall(r"^run_(\w+)\(\) {$", script, re.M)
    assert "unit" in stages
    assert stages == re.search(r"^all_stages=\((.*)\)$", script, re.M)[1].split()
    assert stages == re.findall(r"^#   ([a-z]+)  ", script, re.M)
    jobs = (ROOT / ".github/workflows/ci.yml").read_text()
    assert stages == re.search(r"^ *stage: \[(.*)\]$", jobs, re.M)[1].split(", ")
    seconds = (ROOT / ".ci/seconds").read_text()
    assert stages == re.findall(r"^(\w+) +\d+$", seconds, re.M)


def test_the_install_page_lists_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    _, _, table = (ROOT / "docs/install.md").read_text().partition("## Extras")
    listed = re.findall(r"^\| `([\w-]+)` \|", table, re.M)
    assert sorted(listed) == sorted(project["optional-dependencies"])


def test_files_state_the_same_address_and_version(tmp_path):
    script = runpy.run_path(str(ROOT / "docs/builder/project.py"))
    values, others = script["read"](), {"address": "https://a.b/c-d/e.f", "version": "12.3.4"}
    for name in script["STATED"]:
        text = (ROOT / name).read_text()
        assert script["written"](name, values) == text, "run `python docs/builder/project.py`"
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(script["written"](name, others))
        assert script["written"](name, values, tmp_path) == text
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("notebooks/*")]
    stated = {
        address
        for page in pages
        for address in re.findall(r"https://[\w.-]+/[\w-]+/clip_jax\b", page.read_text())
    }
    assert stated == {values["address"]}


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


# Pairs of modules that treat one subject on two levels.
SAME_SUBJECT = {"__init__", "bert", "digits", "dino", "errors", "images", "tips"}


def test_no_two_modules_of_different_subjects_share_a_name():
    names = Counter(path.stem for path in PACKAGE.rglob("*.py"))
    names += Counter(path.parent.name for path in PACKAGE.rglob("*/__init__.py"))
    shared = {name for name, count in names.items() if count > 1}
    assert shared <= SAME_SUBJECT, "name each after its subject"


def test_the_package_is_read_from_a_short_list_of_subjects():
    modules = list(PACKAGE.glob("*.py"))
    folders = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    assert len(modules) <= 19
    assert len(modules) + len(folders) <= 34


def test_no_function_is_longer_than_80_lines():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1
                assert lines <= 80, f"{path}: {node.name} has {lines} lines"


def test_the_package_uses_the_words_of_the_field():
    assert not [line for path in sorted(PACKAGE.rglob("*.py")) for line in words.misused(path)]


def test_words_of_the_project_alone_are_listed(tmp_path):
    page, module = tmp_path / "page.md", tmp_path / "module.py"
    page.write_text("Extras: `peers`.\n\nIts peers\nhave a trunk.\n")
    module.write_text('"""Dealt."""\n\ntrunk = 1  # hard ≤\nname = "tides"\n')
    lines = [*words.misused(page), *words.misused(module)]
    assert [line.removeprefix(f"{tmp_path}/").split(" is ")[0] for line in lines] == [
        "page.md:3: 'peers'",
        "page.md:4: 'trunk'",
        "module.py:1: 'dealt'",
        "module.py:3: 'hard ≤'",
    ]
    names = words.in_names(ast.parse("def place(path):\n    found = path.said"))
    assert sorted(names) == [(1, "place"), (2, "found"), (2, "said")]


def test_a_method_that_overrides_another_has_its_defaults():
    """Otherwise a call means something else where a variable's type is the base class."""
    trees = [ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")]
    classes = {x.name: x for tree in trees for x in ast.walk(tree) if isinstance(x, ast.ClassDef)}

    def methods(kind: ast.ClassDef) -> dict[str, ast.FunctionDef]:
        return {x.name: x for x in kind.body if isinstance(x, ast.FunctionDef)}

    def bases(kind: ast.ClassDef) -> list[ast.ClassDef]:
        direct = [classes[ast.unparse(x)] for x in kind.bases if ast.unparse(x) in classes]
        return [*direct, *(base for each in direct for base in bases(each))]

    compared = 0
    for kind in classes.values():
        for base in bases(kind):
            for name in methods(kind).keys() & methods(base).keys() - {"__init__"}:
                mine, theirs = (_defaults(methods(x)[name]) for x in (kind, base))
                for argument in mine.keys() & theirs.keys():
                    compared += 1
                    assert mine[argument] == theirs[argument], f"{kind.name}.{name}, {argument}"
    assert compared > 5


def _defaults(function: ast.FunctionDef) -> dict[str, str]:
    """Return the source text of the defaults of a function's arguments."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    last = positional[len(positional) - len(arguments.defaults) :]
    values = [*arguments.defaults, *arguments.kw_defaults]
    pairs = zip([*last, *arguments.kwonlyargs], values, strict=True)
    return {argument.arg: ast.unparse(value) for argument, value in pairs if value}


def test_nothing_is_done_in_the_order_of_a_set():
    """It differs between processes: outputs would not be reproducible, and hosts could deadlock."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            ordered: list[ast.expr] = []
            if isinstance(node, ast.For):
                ordered = [node.iter]
            elif isinstance(node, ast.ListComp | ast.DictComp):
                ordered = [generator.iter for generator in node.generators]
            elif isinstance(node, ast.Call):
                is_ordered = ast.unparse(node.func).endswith(("list", "tuple", "join", "fromkeys"))
                ordered = node.args[:1] if is_ordered else []
            for x in [*ordered]:
                if isinstance(x, ast.GeneratorExp):
                    ordered += [generator.iter for generator in x.generators]
            sets = [ast.unparse(x) for x in ordered if _is_set(x)]
            assert not sets, f"{path}:{getattr(node, 'lineno', '')}: sort {sets}"


def _is_set(node: ast.expr) -> bool:
    """Return whether an expression is clearly a set."""
    if isinstance(node, ast.Set | ast.SetComp):
        return True
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub | ast.BitAnd | ast.BitOr):
        both = [node.left, node.right]
        return any(_is_set(x) or ast.unparse(x).endswith(".keys()") for x in both)
    return isinstance(node, ast.Call) and ast.unparse(node.func) in ("set", "frozenset")


def test_every_picture_exists_is_used_and_has_a_text():
    """Builds write the drawings of the explanations; `docs/builder/pictures.py` writes others. They
    stay small: a clone and a page load them."""
    used = set()
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for text, name in re.findall(r"!\[([^\]]*)\]\(([^)#]+)\)", page.read_text()):
            path = (page.parent / name).resolve()
            if path.parent.name not in ("explanation", "notebooks"):
                assert path.exists(), f"{page} shows {name}"
                assert text, f"{page}: {name} needs a text for those who cannot see it"
            used |= {path, path.with_name(f"{path.stem}-dark.svg")}
    pictures = {*(ROOT / "docs").glob("**/images/*")}
    assert not [path.name for path in pictures - used]
    sizes = {path.name: path.stat().st_size for path in pictures}
    assert not [name for name, size in sizes.items() if size > 150_000]
    assert sum(sizes.values()) < 2_000_000
