"""`clip-jax` as a process: what it imports, its exit codes, and what it prints."""

import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

HEAVY = {"tensorflow", "torch", "matplotlib", "sklearn"}


def run(*arguments: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=stdout, stderr=subprocess.PIPE)


def test_a_reader_who_has_enough_ends_the_command_quietly():
    reads, writes = os.pipe()
    os.close(reads)
    done = run("-m", "clip_jax", "--help", stdout=writes)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        (
            "import clip_jax, clip_jax.cli; clip_jax.cli.main(['--help'])",
            HEAVY | {"jax", "flax", "numpy", "scipy", "grain", "tyro", "orbax"},
        ),
        ("import clip_jax.train, clip_jax.loading", HEAVY | {"tensorflow_datasets"}),
    ],
    ids=["the package and --help", "training"],
)
def test_nothing_heavy_is_imported(code: str, heavy: set[str]):
    done = run("-c", f"{code}; import sys; print('modules', *sys.modules)")
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "clip_jax" in loaded
    assert not loaded & heavy
    if "help" in code:
        assert {"train", "evaluate", "convert", "scale"} <= set(done.stdout.split())


def test_a_bug_shows_its_traceback_and_exits_with_1():
    code = """if True:
        import sys
        from clip_jax import cli
        def planted(args):
            list(zip([1], [1, 2], strict=True))
        cli.COMMANDS['train'] = planted
        sys.exit(cli.main(['train']))"""
    done = run("-c", code)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "in planted" in done.stderr


def test_a_value_of_the_wrong_type_in_a_config_file_is_invalid(tmp_path):
    """Here, without the checks of types that unit tests run under."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from clip_jax.config import Config\ndef get_config():\n    return Config(steps=1e4)\n"
    )
    done = run("-m", "clip_jax", "train", str(path))
    end = "mine.py: config.steps is 10000.0; it must be of type int.\n"
    assert (done.returncode, done.stderr[-len(end) :]) == (2, end)
