"""The run: what it leaves behind, how it resumes, how it refuses and fails."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest
from PIL import Image

from clip_jax.checkpoint import CheckpointConfig
from clip_jax.data.sources.table import TableConfig
from clip_jax.loading import load, starting_params
from clip_jax.models.clip import CLIP
from clip_jax.optim import Adafactor, Constant, CoolDown, Muon, OptimConfig
from clip_jax.refused import Refused
from clip_jax.sharding import MeshConfig
from clip_jax.train import Diverged, train
from tests.conftest import DIGITS, FLAGS, ROOT, final_state, larger, losses, rows, tiny_digits
from tests.forks import Forks


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}


def command(workdir):
    return ["train", DIGITS, "--workdir", workdir, *FLAGS]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """`clip-jax` on one device."""
    with Forks(tmp_path_factory.mktemp("forks"), **ENVIRONMENT) as forks:
        yield forks


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, forks):
    workdir = tmp_path_factory.mktemp("uninterrupted")
    forks.run(*command(workdir))
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


def killed_and_gone_on(words, workdir, forks) -> str:
    """SIGKILL while stepping or while saving (a checkpoint every third step), then to the end."""
    moments, metrics = random.Random(0), workdir / "metrics.jsonl"
    for _ in range(4):
        process = forks.start(*words)
        goal = moments.randint(2, 7)
        begun = len(losses(workdir)) if metrics.exists() else 0
        while process.poll() is None:
            if metrics.exists() and metrics.read_bytes().count(b'"loss"') >= begun + goal:
                break
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.wait()
    assert metrics.exists()
    return forks.run(*words).stderr


@pytest.mark.long
def test_killed_at_random_moments_it_ends_bit_for_bit_the_same(uninterrupted, tmp_path, forks):
    assert "going on from step" in killed_and_gone_on(command(tmp_path), tmp_path, forks)
    assert_identical(final_state(uninterrupted), final_state(tmp_path))
    assert losses(tmp_path) == losses(uninterrupted)


@pytest.mark.slow
def test_with_a_decoder_it_ends_bit_for_bit_the_same_too(tmp_path, forks):
    def words(workdir):
        heads = ("--model.vision.pool-heads", "2", "--model.decoder.num-heads", "2")
        return ["train", DIGITS.with_name("digits_coca.py"), "--workdir", workdir, *FLAGS, *heads]

    forks.run(*words(tmp_path / "whole"))
    assert "going on from step" in killed_and_gone_on(
        words(tmp_path / "cut"), tmp_path / "cut", forks
    )
    assert_identical(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.long
def test_sigterm_saves_and_exits_with_3(uninterrupted, tmp_path, forks):
    with tempfile.TemporaryFile("w+") as stderr:
        process = forks.start(*command(tmp_path), stderr=stderr.fileno())
        while not (tmp_path / "metrics.jsonl").exists() or not losses(tmp_path):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 3
        stderr.seek(0)
        errors = stderr.read()
    assert "stopped by SIGTERM at step" in errors
    assert "Traceback" not in errors
    forks.run(*command(tmp_path))
    assert_identical(final_state(uninterrupted), final_state(tmp_path))


@pytest.mark.long
def test_ctrl_c_during_a_save_is_one_line_and_exit_code_130(tmp_path):
    """In a process of its own: how it ends is what is tested."""
    words = [sys.executable, "-m", "clip_jax", *command(tmp_path), "--checkpoint.every-steps", "1"]
    process = subprocess.Popen(
        words, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    while not list(tmp_path.glob("checkpoints/[2-9]*tmp*")):
        assert process.poll() is None
        time.sleep(0.0005)
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert process.returncode == 130
    (*_, last) = lines = said.splitlines()
    assert last.startswith("clip-jax: interrupted")
    assert all(line.startswith(("step ", "clip-jax: ")) or "parameters" in line for line in lines)


@pytest.mark.long
def test_a_checkpoint_goes_on_on_another_mesh(uninterrupted, tmp_path):
    """The first part on eight devices, the second on 2 × 2 × 2: the losses of one device."""
    whole = tiny_digits(checkpoint=dataclasses.replace(tiny_digits().checkpoint, every_steps=99))
    with jax.default_prng_impl("threefry2x32"):  # as the command draws; the same on every mesh
        stopped = train(dataclasses.replace(whole, stop_after=13), tmp_path)
        assert stopped["step"] == 13
        assert 0 <= stopped["zero_shot/seen/top1"] <= 1  # where it stops it is evaluated
        train(dataclasses.replace(whole, mesh=MeshConfig(data=2, fsdp=2, tensor=2)), tmp_path)
    expected, got = losses(uninterrupted), losses(tmp_path)
    assert got.keys() == expected.keys()
    np.testing.assert_allclose(list(got.values()), list(expected.values()), rtol=1e-5)


@pytest.mark.long
def test_a_branch_is_the_unbroken_run_with_its_schedule(tmp_path):
    """A cool-down from a constant trunk, against the same schedule from the beginning; with a batch
    that doubles on the way."""
    optim = OptimConfig(
        learning_rate=2e-3, warmup_steps=2, schedule=Constant(), optimizer=Adafactor(min_size=8)
    )
    keep = CheckpointConfig(every_steps=4, keep=9)
    trunk = tiny_digits(steps=12, optim=optim, checkpoint=keep, evals=())
    train(trunk, tmp_path / "trunk")
    cooled = dataclasses.replace(
        trunk, steps=12, optim=dataclasses.replace(optim, schedule=CoolDown(steps=4)),
        double_batch_at=(10,),
    )  # fmt: skip
    train(cooled, tmp_path / "unbroken")
    branch = dataclasses.replace(cooled, branch_from=f"{tmp_path / 'trunk'}@8")
    train(branch, tmp_path / "branch")
    assert_identical(final_state(tmp_path / "unbroken", 12), final_state(tmp_path / "branch", 12))
    loss = {row["step"]: row["loss"] for row in rows(tmp_path / "unbroken")}
    assert {row["step"]: row["loss"] for row in rows(tmp_path / "branch")} == {
        step: loss[step] for step in range(9, 13)
    }
    seen = {row["step"]: row["samples_seen"] for row in rows(tmp_path / "branch")}
    assert seen == {9: 9 * 16, 10: 10 * 16, 11: 12 * 16, 12: 14 * 16}
    with pytest.raises(Refused, match="stands at sample 128, which batch_size=16"):
        train(dataclasses.replace(branch, double_batch_at=(4,)), tmp_path / "z")
    record = json.loads((tmp_path / "branch" / "branch.json").read_text())
    assert any("optim.schedule" in line for line in record["differs"])
    with pytest.raises(Refused, match="of steps 4, 8, 12, not of 7; name one"):
        train(dataclasses.replace(branch, branch_from=f"{tmp_path / 'trunk'}@7"), tmp_path / "x")
    with pytest.raises(Refused, match=r"a branch of .* cannot differ from it in:\n  batch_size"):
        train(dataclasses.replace(branch, batch_size=32), tmp_path / "y")


def test_another_config_is_refused_by_name(uninterrupted):
    with pytest.raises(ValueError, match=r"optim\.learning_rate: 0\.002 in .* 0\.5 given"):
        train(tiny_digits(optim=OptimConfig(learning_rate=0.5, warmup_steps=2)), uninterrupted)


@pytest.mark.long
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    config = tiny_digits(
        optim=OptimConfig(learning_rate=1e30, warmup_steps=2),
        checkpoint=CheckpointConfig(every_steps=1),
        evals=(),
    )
    with pytest.raises(Diverged, match=r"step \d+: loss .*Samples \d+ to \d+: \d\d/") as stopped:
        train(config, tmp_path)
    saved = max(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert f"The checkpoint of step {saved} is intact." in str(stopped.value)
    state = final_state(tmp_path, saved)
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


@pytest.mark.long
def test_what_is_damaged_is_named_and_the_run_ends_the_same(uninterrupted, tmp_path, forks):
    workdir = shutil.copytree(uninterrupted, tmp_path / "run")
    damaged = ("config.json", "result.json", "metrics.jsonl", "starts.json")
    for path in [*(workdir / "checkpoints/24/state/d").iterdir(), *map(workdir.joinpath, damaged)]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\n")
    again = forks.run(*command(workdir))
    said = again.stderr.strip().splitlines()
    assert sum("the checkpoint of step 24 is damaged" in line for line in said) == 1
    assert str(workdir / "damaged/24") in again.stderr
    for name in damaged[:3]:
        assert sum(str(workdir / name) in line for line in said) == 1, again.stderr
        assert (workdir / f"{name}.damaged").exists()
    assert "going on from step 21" in again.stderr
    assert "Traceback" not in again.stderr
    assert_identical(final_state(uninterrupted), final_state(workdir))
    assert said[-1].count("clip-jax evaluate") == 1  # the last line says what to run next


# ------------------------------------------------------------------ another run's weights


def tiny(**changes):
    defaults = {"steps": 3, "evals": (), "checkpoint": CheckpointConfig(every_steps=100)}
    return tiny_digits(**(defaults | changes))


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A short phase with few patches and averaged weights."""
    workdir = tmp_path_factory.mktemp("first")
    config = tiny()
    vision = dataclasses.replace(config.model.vision, patch_dropout=0.5)
    optim = OptimConfig(
        learning_rate=2e-3, warmup_steps=1, ema_decay=0.5, skip_norm_ratio=10.0,
        first_moment="bfloat16",
    )  # fmt: skip
    config = dataclasses.replace(
        config, optim=optim, model=dataclasses.replace(config.model, vision=vision), accumulation=2
    )
    train(config, workdir)
    return workdir


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="mounts a small file system")
@pytest.mark.parametrize("size", ["1M", "400k", "60k"])
def test_a_disk_that_fills_ends_a_run_with_one_line_and_it_goes_on(size, tmp_path, environment):
    """Somewhere: in a checkpoint, a line of metrics, TensorBoard, config.json. Then it grows."""
    script = (
        f'mount -t tmpfs -o size={size} tmpfs {tmp_path}; "$@"; echo "exit code $?" >&2; '
        f'mount -o remount,size=100M {tmp_path}; "$@"'
    )
    done = subprocess.run(
        ["unshare", "-Urm", "sh", "-c", script, "sh", *command(tmp_path / "run")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    first, _, second = done.stderr.partition("exit code 2\n")
    assert first.splitlines()[-1].startswith(f"clip-jax: no space left for {tmp_path}/run")
    assert "Traceback" not in done.stderr
    assert done.returncode == 0
    assert "done in" in second


@pytest.mark.slow
def test_a_run_is_loaded_with_its_averaged_weights(first):
    state = final_state(first, 3)
    params, ema = state["params"], state["opt_state"]["inner"]["ema"]
    jax.tree.map(np.testing.assert_array_equal, load(first).params, ema)
    moved = params["visual"]["conv1"]["kernel"] - ema["visual"]["conv1"]["kernel"]
    assert np.abs(moved).max() > 0
    assert state["opt_state"]["inner"]["inner"][0]["mu"]["logit_scale"].dtype == "bfloat16"


@pytest.mark.slow
def test_a_phase_of_full_resolution_goes_on_from_the_first(first, tmp_path):
    config = tiny(
        init_from=str(first), model=larger(tiny().model),
        optim=OptimConfig(learning_rate=0.0, warmup_steps=1),
    )  # fmt: skip
    train(config, tmp_path)
    expected = starting_params(first, config.model)
    jax.tree.map(np.testing.assert_array_equal, final_state(tmp_path, 3)["params"], expected)


@pytest.mark.slow
def test_one_tower_alone_is_taken_and_kept(first, tmp_path):
    optim = OptimConfig(
        learning_rate=1e-2, warmup_steps=1, locked=("image",), optimizer=Muon(), layer_decay=0.9
    )
    config = tiny(init_from=str(first), init_towers=("image",), optim=optim)
    train(config, tmp_path)
    params, before = final_state(tmp_path, 3)["params"], load(first).params
    jax.tree.map(np.testing.assert_array_equal, params["visual"], before["visual"])
    drawn = CLIP(config.model).init(jax.random.key(config.seed))
    moved = np.abs(params["text"]["token_embedding"] - drawn["text"]["token_embedding"])
    assert 0 < moved.max() < 0.1  # drawn, and trained for three steps
