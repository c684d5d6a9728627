"""Several processes as one run: the same numbers, agreement, and every way to end."""

import os
import shutil
import signal
import socket

import jax
import numpy as np
import pytest

from clip_jax.inference.loading import load
from tests.conftest import DIGITS, losses, rows
from tests.contract.conftest import FEW
from tests.data.conftest import FORMATS, make_pairs
from tests.workflow.conftest import SMALL, STEPS, samples, training

PAIRS = (
    *FEW, "--steps", str(STEPS), "--batch-size", "16", "--checkpoint.every-steps", "3",
    "--data.order", "blocks", "--data.shuffle-blocks", "1",
)  # fmt: skip

LENGTHS = """
from dataclasses import replace
from clip_jax.config_files import load_config
from clip_jax.data.batch_plan import TokenBudget
from clip_jax.losses import DistillationConfig, LiveTeacher, SoftmaxConfig
from clip_jax.sharding import MeshConfig

def get_config():
    run = load_config("pairs")
    vision = replace(run.model.vision, max_patches=6, patch_dropout=0.25)
    # In bfloat16 its embeddings would depend on the mesh by 1e-4.
    live = LiveTeacher(weights={teacher!r}, dtype="float32")
    teacher = DistillationConfig(teachers=(live,), features_weight=1.0)
    return replace(
        run,
        model=replace(run.model, vision=vision),
        lengths=TokenBudget(patches=(4, 12), multiple=8),
        objective=(SoftmaxConfig(), teacher),
        mesh=MeshConfig(data=4, fsdp=2),
    )
"""


def assert_same_run(workdir, other):
    expected, got = losses(other), losses(workdir)
    assert list(got) == list(expected) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


def scores(workdir):
    """What the evaluators found, by step and name."""
    return {
        f"{row['step']}/{name}": value
        for row in rows(workdir)
        for name, value in row.items()
        if name.startswith("zero_shot")
    }


def test_a_killed_process_ends_all_and_two_or_one_go_on_with_its_lengths_and_blocks(
    one, tmp_path, start
):
    """A NaFlex model in the block order: batches of two lengths and sizes, with patch dropout and
    a teacher of another resolution, which is split over `fsdp` and not saved. Two processes go on
    to the same bits; one, on another mesh, with the same samples."""
    whole, killed, alone = (tmp_path / name for name in ("whole", "killed", "alone"))
    whole.mkdir()
    killed.mkdir()
    (config := tmp_path / "lengths.py").write_text(LENGTHS.format(teacher=str(one)))
    how = {"config": config, "small": PAIRS}
    flags = ("--data.source.path", FORMATS["tar"](tmp_path, make_pairs(80)).path)
    start(*training(whole, *flags, **how)).end()
    two = start(*training(killed, *flags, **how), TROUBLE="1:8:kill")
    two.until("trouble: kill")
    os.kill(two.pid(0), signal.SIGKILL)
    assert two.end(code=137)[-1] == "launch: process 0 was killed by SIGKILL"
    lost = [line for line in two.lines if line.startswith("[1]")][-1]
    assert "JAX ended this process" in lost or "process 0 ended, and this process" in lost, lost
    assert "Check failure stack trace" not in two.output
    shutil.copytree(killed, alone)
    again = start(*training(killed, *flags, **how))
    assert "resuming from step 6" in "".join(again.end())
    assert losses(killed) == losses(whole)
    jax.tree.map(np.testing.assert_array_equal, *(load(run).params for run in (killed, whole)))

    other = ("--mesh.data", 2, "--mesh.fsdp", 4)
    start(*training(alone, *flags, *other, processes=1, devices=8, **how)).end()
    assert_same_run(alone, whole)
    lengths = [row["tokens"] for row in rows(whole) if "loss" in row]
    assert lengths == [row["tokens"] for row in rows(alone) if "loss" in row]
    assert len({*lengths[:6]}) > 1  # before the kill, and
    assert len({*lengths[5:]}) == 2  # after it
    read = [
        {
            step: sorted(zip(index, keys, strict=True))
            for (step, index), keys in zip(
                samples(run).items(), samples(run, "keys").values(), strict=True
            )
        }
        for run in (whole, killed, alone)
    ]
    assert read[0] == read[1] == read[2]
    assert {len(batch) for batch in read[0].values()} == {24, 8}
    epochs = [key for batch in read[0].values() for _, key in batch]
    assert {epochs[i : i + 80].count(key) for i in (0, 80) for key in epochs} == {1}


def test_two_train_as_one_until_sigterm_to_one_and_another_goes_on(one, tmp_path, start):
    two = start(*training(tmp_path), TROUBLE="1:6:notice")
    two.until("trouble: notice")
    os.kill(two.pid(1), signal.SIGTERM)
    lines = [line for line in two.end(code=3) if "stopped by SIGTERM" in line]
    assert {line[:3] for line in lines} >= {"[0]", "[1]"}, lines  # both say so
    (stopped,) = {int(line.split("at step ")[1].split(",")[0]) for line in lines}
    assert stopped == max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert 6 <= stopped < STEPS
    report = next(row for row in rows(tmp_path) if row["step"] == stopped and "loss" in row)
    assert report["slowest_host"] == socket.gethostname()
    assert report.keys() >= {"slowest_process", "slowest_input_wait", "busy_seconds_per_step"}
    assert "[1] step" not in two.output  # one process speaks

    # With half as many devices, which hold no parameter whole.
    again = start(*training(tmp_path, "--mesh.fsdp", 2, "--mesh.tensor", 2, processes=1))
    assert f"resuming from step {stopped}" in "".join(again.end())
    assert_same_run(tmp_path, one)
    assert samples(tmp_path) == samples(one)
    assert samples(one)[2] == list(range(16, 32))
    assert len(scores(one)) == 6 * 3
    assert scores(tmp_path) == pytest.approx(scores(one), abs=1e-6)


def test_an_exception_and_a_hang_in_one_process_end_all_and_are_shown(tmp_path, start):
    once = ("--evals.0.every-steps", STEPS)  # which no run reaches: nothing is evaluated
    two = start(*training(tmp_path, *once), TROUBLE="1:3:raise")
    last = two.end(code=1)[-1]
    assert last.startswith("launch: process 1 ended first, with exit code 1"), two.output
    assert "the disk of this host is on fire" in last, two.output
    survivor = [line for line in two.lines if line.startswith("[0]")]
    path = tmp_path / "tracebacks/process-0.txt"
    assert "process 1 ended, and this process cannot continue without it" in survivor[-1]
    assert survivor[-1].endswith(f"it starts from the beginning. The traceback is in {path}.")
    assert not [line for line in survivor if "Traceback" in line]
    assert "JaxRuntimeError" in path.read_text()

    two = start(*training(tmp_path, *once), TROUBLE="1:5:hang")
    lines = two.end(code=1)
    shown = [line for line in lines if "nothing finished in 30 minutes" in line]
    assert [line[:3] for line in shown[:2]] == ["[0]", "[1]"], two.output
    assert any(line.startswith("[1]") and line.endswith(" in trouble") for line in lines)
    assert any(line.startswith("[0]") and line.endswith(" in loop") for line in lines)


def test_ctrl_c_ends_all_in_one_line_each_after_a_damaged_checkpoint(one, tmp_path, start):
    workdir = shutil.copytree(one, tmp_path / "run")
    position = workdir / f"checkpoints/{STEPS}/position/metadata"
    position.write_text(position.read_text().replace('"samples": ', '"samples": 1'))
    two = start(*training(workdir), TROUBLE=f"1:{STEPS - 1}:interrupt")
    two.until("trouble: interrupt")
    two.signal(signal.SIGINT)
    two.end(code=130)
    assert "Traceback" not in two.output, two.output
    assert two.output.count("] clip-jax: interrupted") == 2
    # What one process cannot read, none of them goes on from.
    assert two.output.count(f"the checkpoint of step {STEPS} is damaged") == 1
    assert f"resuming from step {STEPS - 3}" in two.output
    assert (workdir / f"damaged/{STEPS}").is_dir()


def test_hosts_that_do_not_agree_are_named(tmp_path, start):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    hosts = [
        start(
            "-m",
            "clip_jax",
            "train",
            DIGITS,
            "--workdir",
            tmp_path,
            *SMALL,
            *flags,
            JAX_NUM_CPU_DEVICES="1",
            CLIP_JAX_COORDINATOR=f"localhost:{port}",
            CLIP_JAX_PROCESS_COUNT="2",
            CLIP_JAX_PROCESS_INDEX=str(index),
        )
        for index, flags in enumerate(((), ("--optim.learning-rate", "0.5")))
    ]
    for host in hosts:
        host.end(code=2)
        assert "config.optim.learning_rate: 0.002 in 0, 0.5 in 1" in host.output
        assert "Traceback" not in host.output
