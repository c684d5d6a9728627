"""`clip-jax` as a process: its imports, exit codes and output; and flags that compilers know."""

import os
import subprocess
import sys

import pytest

from clip_jax.processes import CPU_FLAGS, GPU_OPTIONS, TPU_OPTIONS
from tests.conftest import DIGITS, FLAGS, ROOT

HEAVY = {"tensorflow", "torch", "matplotlib", "sklearn"}
LAION = ["scale", "fit", "tests/golden/laion_imagenet.csv", "--procedure", "laion"]
LAION += ["--columns", "gmacs_per_sample=gflops:GFLOPs", "--draws", "100"]


def run(*arguments, stdout=subprocess.PIPE, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        text=True,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
    )


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
            "import clip_jax, clip_jax.cli.commands; clip_jax.cli.commands.main(['--help'])",
            HEAVY | {"jax", "flax", "numpy", "scipy", "grain", "tyro", "orbax"},
        ),
        ("import clip_jax.train, clip_jax.inference.loading", HEAVY | {"tensorflow_datasets"}),
        (
            f"from clip_jax.cli.commands import main; main({LAION})",
            HEAVY | {"jax", "flax", "grain"},
        ),
    ],
    ids=["the package and --help", "training", "a fit of a table"],
)
def test_nothing_heavy_is_imported(code: str, heavy: set[str]):
    done = run("-c", f"{code}; import sys; print('modules', *sys.modules)")
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "clip_jax" in loaded
    assert not loaded & heavy
    if "help" in code:
        assert {"train", "evaluate", "convert", "scale"} <= set(done.stdout.split())


COMPLETED = {
    "clip-jax sea": "search",
    "clip-jax scale ch": "choose",
    "clip-jax train vit_b1": "vit_b16 vit_b16_distilled",
    "clip-jax train digits vit": "",  # then the shell completes paths
    "clip-jax train digits --data.source.p": "--data.source.path",
    "clip-jax scale fit table.csv --metri": "--metric --metric-is",
    "clip-jax convert a b --to h": "hugging-face",
    "clip-jax convert a b --to hugging-face --verif": "--verify",
}


def test_bash_completes_commands_options_and_values(tmp_path):
    (tmp_path / "script").write_text(run("-m", "clip_jax", "completion", "bash").stdout)
    text = f"source {tmp_path}/script\n"
    for line in COMPLETED:
        text += f"COMP_WORDS=({line}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        text += '_clip_jax; echo "${COMPREPLY[*]}"\n'
    done = subprocess.run(["bash", "-c", text], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [*COMPLETED.values()]
    assert done.stderr == ""


def test_a_bug_shows_its_traceback_and_exits_with_1():
    train = "lambda args: int('none')"
    done = run(
        "-c",
        f"from clip_jax.cli import commands as c; c.COMMANDS['train'] = {train}; c.main(['train'])",
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "in <lambda>" in done.stderr


def test_a_value_of_the_wrong_type_in_a_config_file_is_invalid(tmp_path):
    """Here, without the checks of types that unit tests run under."""
    path = tmp_path / "mine.py"
    path.write_text(
        "from clip_jax.config import Config\ndef get_config():\n    return Config(steps=1e4)\n"
    )
    done = run("-m", "clip_jax", "train", str(path))
    end = "mine.py: config.steps is 10000.0; it must be of type int.\n"
    assert (done.returncode, done.stderr[-len(end) :]) == (2, end)


def test_a_disk_that_fills_is_named_once_and_the_run_goes_on(tmp_path):
    """Somewhere: in a checkpoint, a line of metrics, TensorBoard, config.json. Then it grows.

    `unshare` mounts one that is small.
    """
    script = (
        f'mount -t tmpfs -o size=400k tmpfs {tmp_path}; "$@"; echo "exit code $?" >&2; '
        f'mount -o remount,size=100M {tmp_path}; "$@"'
    )
    command = ["train", str(DIGITS), "--workdir", str(tmp_path / "run"), *FLAGS, "--steps", "9"]
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", sys.executable, "-m", "clip_jax", *command],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    first, _, second = done.stderr.partition("exit code 2\n")
    # Besides, threads of TensorStore may print that their event loop is closed.
    assert first.count(f"clip-jax: no space left for {tmp_path}/run") == 1
    assert str(ROOT / "clip_jax") not in done.stderr  # no traceback of ours
    assert done.returncode == 0
    assert "done in" in second


XLA = "import jax; jax.numpy.zeros(1)"
LIBTPU = (
    "from jax.experimental import topologies; "
    "topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2')"
)
NO_TPU = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


@pytest.mark.parametrize(
    ("code", "variable", "options", "unknown"),
    [
        (XLA, "XLA_FLAGS", GPU_OPTIONS | CPU_FLAGS, "xla_gpu_no_such_flag"),
        (LIBTPU, "LIBTPU_INIT_ARGS", TPU_OPTIONS, "xla_tpu_no_such_flag"),
    ],
    ids=["GPU and CPU", "TPU"],
)
def test_the_flags_are_known_and_others_are_not(code, variable, options, unknown):
    for flags, is_known in ((options, True), (options | {unknown: "true"}, False)):
        text = " ".join(f"--{name}={value}" for name, value in flags.items())
        assert (run("-c", code, **NO_TPU, **{variable: text}).returncode == 0) == is_known
