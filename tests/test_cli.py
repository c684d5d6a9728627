"""What a person types, and what they are told."""

import json
import os
import resource
import subprocess
import sys

import pytest

from clip_jax.__main__ import main as console_script
from clip_jax.__main__ import plans_only
from clip_jax.cli import main
from tests.conftest import DIGITS, ROOT


def test_help_names_every_command_and_is_quick():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "clip_jax", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert done.returncode == 0
    assert {"train", "evaluate", "convert", "scale"} <= set(done.stdout.split())


def test_a_reader_who_has_enough_ends_the_command_quietly():
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        [sys.executable, "-m", "clip_jax", "--help"],
        cwd=ROOT, stdout=writes, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, "")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, clip_jax; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "clip_jax" in loaded
    assert not loaded & {
        "tensorflow", "torch", "matplotlib", "jax", "flax", "numpy", "sklearn", "scipy", "grain"
    }  # fmt: skip


def test_training_needs_neither_tensorflow_nor_torch_nor_matplotlib():
    code = "import sys, clip_jax.train, clip_jax.loading; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"tensorflow", "torch", "matplotlib", "sklearn", "tensorflow_datasets"}


@pytest.mark.parametrize(
    ("args", "option"),
    [
        (["train", str(ROOT / "configs/pairs.py"), "--data.source.path", "nowhere"], "--workdir"),
        (["evaluate", "nowhere"], "--output"),
        (["predict", "nowhere", "--images", "nowhere", "--labels", "x"], "--sheet"),
        (["search", "nowhere", "nowhere", "--text", "x"], "--sheet"),
        (["plan", str(DIGITS)], "--plot"),
        (["scale", "fit", "nowhere"], "--plot"),
        (["scale", "collect", "nowhere"], "--output"),
        (["scale", "ladder", str(ROOT / "configs/ladder_digits.py")], "--root"),
    ],
)
def test_a_destination_is_refused_before_anything_is_done(args, option, capsys, tmp_path):
    (tmp_path / "file").write_text("as it was")
    name = "x.png" if option in ("--sheet", "--plot") else "x"
    for folder, why in ((tmp_path / "file", "is a file"), ("/proc", "cannot be written")):
        assert main([*args, option, f"{folder}/{name}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"{folder} {why}" in line
        assert option in line
    assert (tmp_path / "file").read_text() == "as it was"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["nonsense"], "no command 'nonsense'"),
        (["train"], "train needs a config file"),
        (["train", "nowhere.py"], "no config file at nowhere.py"),
        (["train", str(DIGITS), "--mesh.data", "3"], "does not use all 8 devices"),
        (["train", str(DIGITS), "--batch-size", "12"], "batch_size=12 cannot be split over 8"),
        (["train", str(DIGITS), "--steps", "10"], "optim.warmup_steps=200 leaves nothing"),
        (["train", str(ROOT / "configs/pairs.py"), "--data.source.path", "no.csv"], "no.csv"),
        (["evaluate", "nowhere"], "there is no nowhere"),
        (["scale", "nonsense"], "scale needs ladder, collect, choose, fit or report"),
        (["bench", "nonsense"], "bench needs one of input"),
        (["bench", "input"], "bench input needs a config file"),
    ],
)
def test_wrong_use_is_one_message_and_exit_code_2(args, says, capsys, tmp_path):
    if args[0] == "train" and len(args) > 2:
        args = [*args, "--workdir", str(tmp_path)]
    assert main(args) == 2
    printed = capsys.readouterr()
    assert says in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_json_goes_to_standard_output_alone(capsys):
    table = str(ROOT / "tests/golden/scaling_points.csv")
    assert main(["scale", "fit", table, "--where", "upstream_dataset=LAION*", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"alpha", "beta", "points"} <= result.keys()


def test_the_console_script_starts_itself_once_with_huge_pages(monkeypatch):
    started = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(os, "execv", lambda path, argv: started.append((path, argv)))
    monkeypatch.setattr(sys, "argv", ["clip-jax", "--version"])
    monkeypatch.setenv("GLIBC_TUNABLES", "")  # so that it is undone
    monkeypatch.delenv("GLIBC_TUNABLES")
    assert console_script() == 0
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert console_script() == 0
    assert len(started) == 1


def test_libtpu_is_left_alone_where_no_accelerator_is(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("TPU_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not plans_only(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "libtpu" or None)
    assert plans_only(tmp_path)
    (tmp_path / "vfio").mkdir()
    assert plans_only(tmp_path)
    (tmp_path / "vfio/0").touch()
    assert not plans_only(tmp_path)
    (tmp_path / "vfio/0").unlink()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b")
    assert not plans_only(tmp_path)
