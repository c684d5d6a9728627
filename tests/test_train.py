"""The run: what it leaves behind, how it resumes, how it refuses and fails."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax.checkpoint import Checkpoints
from clip_jax.data.sources.table import TableConfig
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig
from clip_jax.step import State
from clip_jax.train import Diverged, Preempted, train
from tests.runs import DIGITS, FLAGS, ROOT, tiny_digits


def rows(workdir, name="metrics.jsonl"):
    lines = (workdir / name).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]  # one may be half written


def losses(workdir):
    return {row["step"]: row["loss"] for row in rows(workdir) if "loss" in row}


def final_state(workdir, step=24) -> State:
    """The checkpoint as plain arrays, whatever mesh wrote it."""
    import orbax.checkpoint as ocp

    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        assert manager.latest_step() == step
        items = manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))
    return items["state"]


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def command(workdir, *flags):
    return [
        sys.executable, "-m", "clip_jax", "train", str(DIGITS), "--workdir", str(workdir),
        *FLAGS, *flags,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """One device, and one compilation for all processes of this module."""
    cache = tmp_path_factory.mktemp("compilation_cache")
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, environment):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    subprocess.run(command(workdir), env=environment, check=True, capture_output=True)
    return workdir


def test_a_run_leaves_its_numbers_pictures_and_checkpoints(uninterrupted):
    reports = [row for row in rows(uninterrupted) if "loss" in row]
    assert [row["step"] for row in reports] == list(range(1, 25))
    assert reports[-1].keys() >= {
        "samples_seen", "loss", "image_to_text_accuracy", "text_to_image_accuracy", "grad_norm",
        "param_norm", "logit_scale", "learning_rate", "images_per_second",
        "images_per_second_per_device", "model_flops_per_step", "input_wait",
    }  # fmt: skip
    assert "mfu" not in reports[-1]  # no published peak for a CPU
    result = json.loads((uninterrupted / "result.json").read_text())
    assert result["samples_seen"] == 24 * 16
    assert 0 <= result["zero_shot/seen/top1"] <= result["zero_shot/seen/top5"] <= 1
    assert "zero_shot/unseen/top1" in result
    with Image.open(uninterrupted / "evals/predictions.png") as picture:
        assert picture.size[0] > 500
    assert sorted(int(p.name) for p in (uninterrupted / "checkpoints").iterdir()) == [18, 21, 24]
    assert json.loads((uninterrupted / "config.json").read_text())["batch_size"] == 16
    assert list((uninterrupted / "tensorboard").iterdir())


def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(
    uninterrupted, tmp_path, environment
):
    """SIGKILL while stepping or while saving (a checkpoint every third step), then again."""
    moments = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            command(tmp_path), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        goal = moments.randint(2, 7)
        begun = len(losses(tmp_path)) if (tmp_path / "metrics.jsonl").exists() else 0
        while process.poll() is None:
            metrics = tmp_path / "metrics.jsonl"
            if metrics.exists() and metrics.read_bytes().count(b"loss") >= begun + goal:
                break
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.wait()
    assert (tmp_path / "metrics.jsonl").exists()
    finished = subprocess.run(command(tmp_path), env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "going on from step" in finished.stderr
    assert_identical(final_state(uninterrupted), final_state(tmp_path))
    assert losses(tmp_path) == losses(uninterrupted)


def test_sigterm_saves_and_exits_with_3(uninterrupted, tmp_path, environment):
    process = subprocess.Popen(
        command(tmp_path), env=environment, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 3
    assert "stopped by SIGTERM at step" in errors
    assert "Traceback" not in errors
    subprocess.run(command(tmp_path), env=environment, check=True, capture_output=True)
    assert_identical(final_state(uninterrupted), final_state(tmp_path))


def test_a_checkpoint_goes_on_on_another_mesh(uninterrupted, tmp_path):
    """The first half on eight devices, the second on 2 × 2 × 2: the losses of one device."""
    half = tiny_digits(checkpoint=dataclasses.replace(tiny_digits().checkpoint, every_steps=12))
    with jax.default_prng_impl("threefry2x32"):  # as the command draws; the same on every mesh
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 12)
            with pytest.raises(Preempted, match="stopped by SIGTERM at step 12"):
                train(half, tmp_path)
        train(dataclasses.replace(half, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path)
    expected, got = losses(uninterrupted), losses(tmp_path)
    assert got.keys() == expected.keys()
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


def test_another_config_is_refused_by_name(uninterrupted):
    with pytest.raises(ValueError, match=r"optim\.learning_rate: 0\.002 in .* 0\.5 given"):
        train(tiny_digits(optim=OptimConfig(learning_rate=0.5, warmup_steps=2)), uninterrupted)


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    config = tiny_digits(optim=OptimConfig(learning_rate=1e30, warmup_steps=2), evals=())
    with pytest.raises(Diverged, match=r"step \d+: loss .*Samples \d+ to \d+: \d\d/"):
        train(config, tmp_path)
    saved = [int(path.name) for path in (tmp_path / "checkpoints").iterdir()]
    for step in saved:
        state = final_state(tmp_path, max(saved))
        assert step >= 0
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state["params"]))


def test_unreadable_samples_are_replaced_counted_and_logged_once(tmp_path):
    rng = np.random.default_rng(0)
    lines = ["image,caption"]
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,picture number {i}")
    (tmp_path / "7.png").write_bytes(b"not an image")
    lines[12] = "11.png,"
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    base = tiny_digits()
    config = tiny_digits(
        steps=5,
        data=dataclasses.replace(
            base.data, source=TableConfig(path=str(tmp_path / "pairs.csv")), max_bad_share=0.2
        ),
        evals=(),
    )
    train(config, tmp_path / "run")  # 80 samples: each of the 40 twice
    skipped = rows(tmp_path / "run", "skipped.jsonl")
    assert len(skipped) == 4
    assert {"step", "position", "key", "reason"} <= skipped[0].keys()
    assert {row["reason"] for row in skipped if "empty" in row["reason"]}


def test_the_last_line_says_what_to_run_next(uninterrupted, tmp_path, environment):
    again = subprocess.run(
        command(uninterrupted), env=environment, capture_output=True, text=True, check=True
    )
    assert again.stderr.strip().splitlines()[-1].count("clip-jax evaluate") == 1
