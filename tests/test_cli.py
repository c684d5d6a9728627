"""What a person types, and what they are told."""

import json
import os
import subprocess
import sys
import time

import pytest

from clip_jax.__main__ import main as console_script
from clip_jax.cli import main
from tests.runs import DIGITS, ROOT


def test_help_names_every_command_and_is_quick():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "clip_jax", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert time.perf_counter() - start < 2
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
    code = "import sys, clip_jax.train, clip_jax.load; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert not loaded & {"tensorflow", "torch", "matplotlib", "sklearn", "tensorflow_datasets"}


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
        (["scale", "nonsense"], "scale needs one of ladder, collect, fit"),
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


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        (["--optim.learning-rat", "1"], "--optim.learning-rate"),
        (["--batch-size", "0"], "batch_size=0 must be at least 1"),
        (["--batch-size", "many"], "many"),
        (["--model.vision.num-heads", "7"], "vision.num_heads=7"),
    ],
)
def test_a_wrong_flag_is_explained_and_exits_with_2(flag, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(DIGITS), *flag])
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


def test_a_config_file_without_get_config_is_named(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text("x = 1\n")
    assert main(["train", str(path)]) == 2
    assert "has no get_config()" in capsys.readouterr().err


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
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert console_script() == 0
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]
    assert os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert console_script() == 0
    assert len(started) == 1
