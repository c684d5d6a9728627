"""Several processes as one run: the same numbers, agreement, and every way to end."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from tests.conftest import DIGITS, FLAGS, ROOT, TINY, losses, rows, write_run

pytestmark = pytest.mark.slow
STEPS = 24
TINY_PAIRS = (
    "--steps 24 --batch-size 16 --report-every 1 --checkpoint.every-steps 3 "
    "--optim.warmup-steps 2 --model.embed-dim 16 --model.dtype float32 "
    "--model.vision.image-size 16 --model.vision.patch-size 8 --model.vision.width 16 "
    "--model.vision.num-heads 2 --model.vision.depth 1 --model.text.width 16 "
    "--model.text.num-heads 2 --model.text.depth 1 --model.text.vocab-size 600"
)


@pytest.fixture(scope="module")
def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def launch(
    environment, workdir, *flags,
    processes=2, devices=4, trouble="-1:0", size=tuple(FLAGS), config=DIGITS,
):  # fmt: skip
    command = [
        sys.executable, str(ROOT / "launch/local.py"),
        "--processes", str(processes), "--devices", str(devices), "--module", "tests.recorded",
        "train", str(config), "--workdir", str(workdir), *size, *flags,
    ]  # fmt: skip
    return subprocess.Popen(
        command, env=environment | {"TROUBLE": trouble}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def finish(process):
    said, _ = process.communicate(timeout=200)
    return process.returncode, said


def pids(launcher, processes=2):
    """The processes that a launcher has started, by number."""
    lines = [launcher.stdout.readline() for _ in range(processes)]
    return [int(line.split()[-1]) for line in lines]


def wait_for(workdir, step, seconds=200):
    deadline = time.monotonic() + seconds
    while not (workdir / "metrics.jsonl").exists() or max(losses(workdir), default=0) < step:
        assert time.monotonic() < deadline, "the run does not come to that step"
        time.sleep(0.02)


def samples(workdir, what="index"):
    """Which samples every step saw when it was last done, in the order of the global batch."""
    files = sorted(workdir.glob("samples-*.jsonl"))
    found = [{row["step"]: row for row in rows(workdir, path.name)} for path in files]
    return {
        step: [i for part in found[: row["processes"]] for i in part[step][what]]
        for step, row in found[0].items()
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory, environment):
    """One process with eight devices."""
    workdir = tmp_path_factory.mktemp("one")
    code, said = finish(launch(environment, workdir, processes=1, devices=8))
    assert code == 0, said
    return workdir


def assert_same_run(workdir, one):
    expected, got = losses(one), losses(workdir)
    assert list(got) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)
    assert samples(workdir) == samples(one)


def test_two_processes_train_as_one(one, tmp_path, environment):
    code, said = finish(launch(environment, tmp_path))
    assert code == 0, said
    assert_same_run(tmp_path, one)
    assert samples(tmp_path)[2] == list(range(16, 32))
    reports = [row for row in rows(tmp_path) if "loss" in row]
    assert reports[-1]["slowest_host"] == socket.gethostname()
    assert {"slowest_process", "slowest_input_wait", "busy_seconds_per_step"} <= reports[-1].keys()
    assert "[1] step" not in said  # one process speaks
    results = [json.loads((path / "result.json").read_text()) for path in (one, tmp_path)]
    scores = [{k: v for k, v in x.items() if k.startswith("zero_shot")} for x in results]
    assert len(scores[0]) == 6
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)


def test_sigterm_to_one_saves_a_common_step_and_other_devices_go_on(one, tmp_path, environment):
    process = launch(environment, tmp_path)
    second = pids(process)[1]
    wait_for(tmp_path, 4)
    os.kill(second, signal.SIGTERM)
    code, said = finish(process)
    assert code == 3, said
    stopped = {line.split("at step ")[1].split(",")[0] for line in said.splitlines()
               if "stopped by SIGTERM" in line}  # fmt: skip
    assert len(stopped) == 1, said
    assert sum("stopped by SIGTERM" in line for line in said.splitlines()) >= 2  # both say so
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert {str(saved)} == stopped
    # On one process with four devices for a while, then on two with two each.
    process = launch(environment, tmp_path, processes=1, devices=4)
    wait_for(tmp_path, saved + 4)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 3, said
    assert f"going on from step {saved}" in said
    code, said = finish(launch(environment, tmp_path, devices=2))
    assert code == 0, said
    assert_same_run(tmp_path, one)


def test_ctrl_c_ends_all_within_seconds_in_one_line_each(tmp_path, environment):
    process = launch(environment, tmp_path, "--checkpoint.every-steps", "1")
    wait_for(tmp_path, 3)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, said = finish(process)
    assert time.monotonic() - begun < 15
    assert code == 130, said
    assert "Traceback" not in said
    assert said.count("] clip-jax: interrupted") == 2


def test_a_damaged_checkpoint_is_passed_over_by_all(one, tmp_path, environment):
    """What one process cannot read, none of them goes on from."""
    workdir = shutil.copytree(one, tmp_path / "run")
    (workdir / "checkpoints/24/state/d").rename(tmp_path / "d")
    code, said = finish(launch(environment, workdir))
    assert code == 0, said
    assert said.count("the checkpoint of step 24 is damaged") == 1
    assert "going on from step 21" in said
    assert "Traceback" not in said
    assert (workdir / "damaged/24").is_dir()
    assert list(losses(workdir)) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_all_and_is_named(victim, tmp_path, environment):
    process = launch(environment, tmp_path)
    victims = pids(process)
    wait_for(tmp_path, 4)
    os.kill(victims[victim], signal.SIGKILL)
    killed = time.monotonic()
    code, said = finish(process)
    assert time.monotonic() - killed < 60
    assert code == 128 + signal.SIGKILL
    assert said.splitlines()[-1] == f"launch: process {victim} was killed by SIGKILL"


def test_stretches_read_by_two_until_killed_are_read_on_by_one(tmp_path, environment):
    """The same samples in the same places as of one process that was never killed."""
    rng = np.random.default_rng(0)
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(40):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(picture, "PNG")
                for name, content in (("png", picture.getvalue()), ("txt", b"number %d" % i)):
                    member = tarfile.TarInfo(f"{i:02}.{name}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    flags = f"--data.source.path {tmp_path}/*.tar --data.order stretches --data.window 1"
    how = {"config": ROOT / "configs/pairs.py", "size": TINY_PAIRS.split()}

    def run(name, **options):
        return launch(environment, tmp_path / name, *flags.split(), **how, **options)

    code, said = finish(run("whole", processes=1, devices=8))
    assert code == 0, said
    process = run("killed", trouble="1:12:hang")
    numbers = pids(process)
    wait_for(tmp_path / "killed", 10)
    for number in numbers:
        os.kill(number, signal.SIGKILL)
    assert finish(process)[0] == 137
    code, said = finish(run("killed", processes=1, devices=8))
    assert code == 0, said
    assert "going on from step" in said
    whole, killed = (samples(tmp_path / name, "keys") for name in ("whole", "killed"))
    assert killed == whole
    assert list(whole) == list(range(1, STEPS + 1))
    seen = [key for step in range(1, STEPS + 1) for key in whole[step]]
    assert {seen[i : i + 80].count(key) for i in (0, 80) for key in seen} == {1}
    expected, got = losses(tmp_path / "whole"), losses(tmp_path / "killed")
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


def test_an_exception_in_one_process_ends_all_and_is_named(tmp_path, environment):
    process = launch(environment, tmp_path, trouble="1:5")
    wait_for(tmp_path, 3)
    begun = time.monotonic()
    code, said = finish(process)
    assert time.monotonic() - begun < 60
    assert code == 1
    assert said.splitlines()[-1].startswith("launch: process 1 ended first, with exit code 1")
    assert "the disk of this host is on fire" in said.splitlines()[-1]


def test_a_hanging_process_is_ended_by_the_watchdog(tmp_path, environment):
    flags = ["--processes.watchdog-minutes", "0.5"]
    code, said = finish(launch(environment, tmp_path, *flags, trouble="1:5:hang"))
    assert code == 1
    assert "nothing finished in 0.5 minutes" in said
    assert "in recorded" in said  # the stack of what hangs
    assert "Thread 0x" in said


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--optim.learning-rate", "0.5"], "config.optim.learning_rate: 0.002 in 0, 0.5 in 1"),
        (["--data.source.split-seed", "7"], "config.data.source.split_seed"),
    ],
)
def test_hosts_that_do_not_agree_are_named(flags, says, tmp_path, environment):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "clip_jax", "train", str(DIGITS), "--workdir", str(tmp_path),
             *FLAGS, *(flags if index else [])],
            env=environment | {
                "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1",
                "CLIP_JAX_COORDINATOR": f"localhost:{port}", "CLIP_JAX_PROCESS_COUNT": "2",
                "CLIP_JAX_PROCESS_INDEX": str(index),
            },
            stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    for error in errors:
        assert says in error
        assert "Traceback" not in error


def test_the_first_hundred_losses_of_the_digits(tmp_path, environment):
    """The config as it ships, in float32: two processes of four devices, one of eight."""
    found = {}
    for processes, devices in ((1, 8), (2, 4)):
        workdir = tmp_path / str(processes)
        workdir.mkdir()
        process = launch(
            environment, workdir, "--report-every", "1", processes=processes, devices=devices,
            size=(),
        )  # fmt: skip
        wait_for(workdir, 100, seconds=1_000)
        process.send_signal(signal.SIGTERM)
        code, said = finish(process)
        assert code == 3, said
        found[processes] = [losses(workdir)[step] for step in range(1, 101)]
    difference = np.abs(np.array(found[1]) - found[2]).max()
    print(f"largest difference of 100 losses: {difference:.1e}; the last loss {found[1][-1]:.4f}")
    assert difference <= 1e-5


def test_two_processes_evaluate_as_one_also_while_watching(tmp_path, environment):
    workdir, _, _ = write_run(TINY, tmp_path / "run")
    few = ["--digits.per-number", "1", "--digits.source.digits", "1", "--mesh.fsdp", "2"]

    def evaluate(processes, *more):
        command = [
            sys.executable, str(ROOT / "launch/local.py"), "--processes", str(processes),
            "--devices", str(8 // processes), "evaluate", *more, *few, "--json",
        ]  # fmt: skip
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
        found = [line for line in done.stdout.splitlines() if line.startswith("[") and "{" in line]
        assert len(found) == 1  # one process speaks
        return json.loads(found[0].partition("] ")[2])

    one, first = evaluate(1, str(workdir)), evaluate(1, f"{workdir}@1")
    assert one.keys() >= {"zero_shot/seen/top1", "zero_shot/seen/top5"}
    assert evaluate(2, str(workdir)) == pytest.approx(one, abs=1e-6)
    assert evaluate(2, str(workdir), "--watch") == pytest.approx(one, abs=1e-6)
    found = {row.pop("step"): row for row in rows(workdir, "evals/watch.jsonl")}
    assert list(found) == [1, 2]
    assert found[1] == pytest.approx(first, abs=1e-6)
