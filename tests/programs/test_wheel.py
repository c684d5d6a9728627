"""The wheel in an empty environment, on a machine without a network: the bundled model works."""

import json
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import clip_jax
from tests.conftest import ROOT

EXAMPLES = ROOT / "studies/icons/examples"
LOAD = """\
import clip_jax
model = clip_jax.load("icons")
print(clip_jax.__file__, model.tokenize("bell icon").shape)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """An environment with the wheel, and with the packages of this one but its clip_jax."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("clip_jax", "configs"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("clip_jax_pods.py", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copyfile(ROOT / name, source / name)
    pip = (sys.executable, "-m", "pip")
    options = ("--no-index", "--no-deps", "--quiet")
    build = ("wheel", "--no-build-isolation", "--wheel-dir", folder, source)
    subprocess.run([*pip, *build, *options], check=True)
    venv.create(folder / "venv", symlinks=True)
    (wheel,) = folder.glob("*.whl")
    install = ("--python", folder / "venv", "install", *options, wheel)
    subprocess.run([*pip, *install], check=True)
    (packages,) = (folder / "venv/lib").glob("python*/site-packages")
    # Of a path in a .pth file, the .pth files are not read: an editable clip_jax is not seen.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv"


def run(environment: Path, folder: Path, *command: object, code: int = 0) -> str:
    """Run a program of the environment in a namespace without a network.

    Return its output, or what it says on standard error if it ends with another `code` than 0.
    """
    done = subprocess.run(
        ["unshare", "-Urn", environment / "bin" / str(command[0]), *map(str, command[1:])],
        cwd=folder,
        env={"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


def test_python_loads_the_bundled_model(environment, tmp_path):
    output = run(environment, tmp_path, "python", "-c", LOAD)
    assert output.startswith(str(environment))
    assert output.endswith(" (1, 16)\n")
    (notice,) = environment.glob("lib/*/site-packages/*.dist-info/licenses/NOTICE")
    assert "Teenyicons" in notice.read_text(encoding="utf-8")


def test_commands_take_its_name(environment, tmp_path):
    shutil.copytree(EXAMPLES, tmp_path / "images")
    words = ("--labels", "umbrella", "bell", "--json")
    predict = ("clip-jax", "predict", "icons", "--images", "images/bell-bi.png", *words)
    (result,) = json.loads(run(environment, tmp_path, *predict))
    assert [row["label"] for row in result["labels"]] == ["bell", "umbrella"]
    run(environment, tmp_path, "clip-jax", "embed", "icons", "images", "embeddings")
    query = ("--text", "umbrella icon", "--top", 3, "--sheet", "hits.png", "--json")
    hits = json.loads(
        run(environment, tmp_path, "clip-jax", "search", "icons", "embeddings", *query)
    )
    assert [hit["key"].split("-")[0] for hit in hits] == ["umbrella"] * 3
    assert (tmp_path / "hits.png").exists()


def test_the_command_refuses_to_run_beside_the_other_package_of_its_import_name(
    environment, tmp_path
):
    (packages,) = environment.glob("lib/python*/site-packages")
    other = packages / "clip_jax-0.0.6.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: clip-jax\nVersion: 0.0.6\n")
    ours = packages / "clip_jax/__init__.py"
    code = ours.read_text()
    try:
        ours.write_text("import a_module_of_the_other_package\n")
        message = run(environment, tmp_path, "clip-jax", "--version", code=2)
        assert message.count("\n") == 1
        assert "version 0.0.6 of the package clip-jax" in message
        assert str(packages) in message
        assert "pip uninstall clip-jax &&" in message
    finally:
        ours.write_text(code)
        shutil.rmtree(other)
    assert run(environment, tmp_path, "clip-jax", "--version").strip() == clip_jax.__version__
