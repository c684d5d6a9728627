"""The run: what it leaves behind, how it resumes, what it refuses and how it fails."""

import dataclasses
import json
import shutil
import signal
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image

from clip_jax.checkpoint import CheckpointConfig, Checkpoints
from clip_jax.data.sources.table import TableConfig
from clip_jax.evals.evaluator import Evaluations
from clip_jax.loading import load, starting_params
from clip_jax.optim import Constant, CoolDown, OptimConfig
from clip_jax.processes import ProcessesConfig
from clip_jax.refused import Refused
from clip_jax.serialize import to_dict
from clip_jax.sharding import MeshConfig, data_part, make_mesh
from clip_jax.step import Program, shapes
from clip_jax.train import Diverged, Preempted, agree, begin, open_data, train
from tests.conftest import final_state, larger, losses, rows, tiny_digits

STEPS = 6


def tiny(**changes):
    """A run of six steps, saved at every second and evaluated at the third and the last."""
    evals = (dataclasses.replace(tiny_digits().evals[0], every_steps=3),)
    checkpoint = CheckpointConfig(every_steps=2)
    return tiny_digits(**{"steps": STEPS, "evals": evals, "checkpoint": checkpoint} | changes)


def optim(**changes):
    return OptimConfig(**{"learning_rate": 2e-3, "warmup_steps": 2, "weight_decay": 0.1} | changes)


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    train(tiny(), workdir)
    return workdir


def test_a_run_leaves_its_numbers_pictures_and_checkpoints(finished):
    reports = [row for row in rows(finished) if "loss" in row]
    assert [row["step"] for row in reports] == list(range(1, STEPS + 1))
    assert reports[-1].keys() >= {
        "samples_seen", "loss", "image_to_text_accuracy", "text_to_image_accuracy", "grad_norm",
        "param_norm", "logit_scale", "learning_rate", "images_per_second",
        "images_per_second_per_device", "model_flops_per_step", "input_wait",
    }  # fmt: skip
    assert "mfu" not in reports[-1]  # no published peak for a CPU
    assert [row["step"] for row in rows(finished) if "zero_shot/seen/top1" in row] == [3, STEPS]
    result = json.loads((finished / "result.json").read_text())
    assert result["samples_seen"] == STEPS * 16
    assert 0 <= result["zero_shot/seen/top1"] <= result["zero_shot/seen/top5"] <= 1
    assert "zero_shot/unseen/top1" in result
    with Image.open(finished / "evals/predictions.png") as picture:
        assert picture.size[0] > 500
    assert sorted(int(p.name) for p in (finished / "checkpoints").iterdir()) == [2, 4, 6]
    assert json.loads((finished / "config.json").read_text())["batch_size"] == 16
    assert list((finished / "tensorboard").iterdir())


def test_sigterm_saves_and_the_run_ends_bit_for_bit_the_same(finished, tmp_path, capfd):
    def signalled(self: Checkpoints, step: int) -> bool:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)
        return False

    patch = mock.patch.object(
        Checkpoints, "reached_preemption", autospec=True, side_effect=signalled
    )
    with patch, pytest.raises(Preempted, match="stopped by SIGTERM at step 3, which is saved in"):
        train(tiny(), tmp_path)
    assert (tmp_path / "checkpoints/3").is_dir()
    train(tiny(), tmp_path)
    assert "going on from step 3" in capfd.readouterr().err
    assert_identical(final_state(finished, STEPS), final_state(tmp_path, STEPS))
    assert losses(tmp_path) == losses(finished)


def test_what_is_damaged_is_named_and_the_run_ends_the_same(finished, tmp_path, capfd):
    workdir = shutil.copytree(finished, tmp_path / "run")
    damaged = ("config.json", "result.json", "metrics.jsonl", "starts.json")
    for path in [*(workdir / "checkpoints/6/state/d").iterdir(), *map(workdir.joinpath, damaged)]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\n")
    train(tiny(), workdir)
    lines = capfd.readouterr().err.strip().splitlines()
    assert sum("the checkpoint of step 6 is damaged" in line for line in lines) == 1
    assert any(str(workdir / "damaged/6") in line for line in lines)
    for name in damaged[:3]:
        assert sum(str(workdir / name) in line for line in lines[:-1]) == 1, lines
        assert (workdir / f"{name}.damaged").exists()
    assert any("going on from step 4" in line for line in lines)
    assert_identical(final_state(finished, STEPS), final_state(workdir, STEPS))
    assert lines[-1].count("clip-jax evaluate") == 1  # the last line says what to run next


def test_a_branch_is_the_unbroken_run_with_its_schedule(tmp_path):
    """A cool-down from a run of constant learning rate, against the same schedule from the
    beginning; with a batch that doubles on the way."""
    evals = tiny_digits().evals  # at every twelfth step, and at the last
    stopped = train(
        tiny(optim=optim(schedule=Constant()), stop_after=4, evals=evals), tmp_path / "parent"
    )
    assert stopped["step"] == 4
    assert 0 <= stopped["zero_shot/seen/top1"] <= 1
    cooled = tiny(optim=optim(schedule=CoolDown(steps=2)), double_batch_at=(5,), evals=())
    train(cooled, tmp_path / "unbroken")
    branch = dataclasses.replace(cooled, branch_from=f"{tmp_path / 'parent'}@4")
    train(branch, tmp_path / "branch")
    assert_identical(final_state(tmp_path / "unbroken", 6), final_state(tmp_path / "branch", 6))
    loss = losses(tmp_path / "unbroken")
    assert losses(tmp_path / "branch") == {step: loss[step] for step in (5, 6)}
    seen = {row["step"]: row["samples_seen"] for row in rows(tmp_path / "branch")}
    assert seen == {5: 5 * 16, 6: 7 * 16}
    record = json.loads((tmp_path / "branch/branch.json").read_text())
    assert any("optim.schedule" in line for line in record["differs"])
    for number, (changes, message) in enumerate(
        (
            ({"double_batch_at": (2,)}, "stands at sample 64, which batch_size=16"),
            ({"branch_from": f"{tmp_path / 'parent'}@3"}, "of steps 2, 4, not of 3; name one"),
            ({"batch_size": 32}, r"a branch of .* cannot differ from it in:\n  batch_size"),
        )
    ):
        with pytest.raises(Refused, match=message):
            train(dataclasses.replace(branch, **changes), tmp_path / str(number))


def test_another_config_is_refused_by_name(finished):
    with pytest.raises(Refused, match=r"optim\.learning_rate: 0\.002 in .* 0\.5 given"):
        train(tiny(optim=optim(learning_rate=0.5)), finished)


def test_starts_without_progress_are_counted_and_refused(tmp_path):
    config = tiny(processes=ProcessesConfig(max_starts=2))
    mesh = make_mesh(config.mesh)
    pipeline, evaluations = open_data(config, *data_part(mesh)), Evaluations(config.evals, STEPS)

    def starts(step: int, config=config) -> None:
        agree(config, epath.Path(tmp_path), pipeline, evaluations, step)

    for step in (0, 2, 2):
        starts(step)
    with pytest.raises(Refused, match=r"the last 2 starts in .* all began at step 2"):
        starts(2)
    starts(2, dataclasses.replace(config, processes=ProcessesConfig(max_starts=10)))


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    config = tiny(
        optim=optim(learning_rate=1e30), checkpoint=CheckpointConfig(every_steps=1), evals=()
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
    source = TableConfig(path=str(tmp_path / "pairs.csv"))
    data = dataclasses.replace(tiny().data, source=source, max_bad_share=0.2)
    train(tiny(steps=5, data=data, evals=()), tmp_path / "run")  # 80 samples: each of the 40 twice
    skipped = rows(tmp_path / "run", "skipped.jsonl")
    assert len(skipped) == 4
    assert {"step", "position", "key", "reason"} <= skipped[0].keys()
    assert {row["reason"] for row in skipped if "empty" in row["reason"]}


# ------------------------------------------------------------------ another run's weights


def averaged_run(workdir: Path, **changes):
    """Write what a run with averaged weights leaves at its first step; return its state."""
    config = tiny(steps=1, optim=optim(warmup_steps=0, ema_decay=0.5, **changes))
    rng = np.random.default_rng(0)
    state, _ = shapes(config.recipe, make_mesh(MeshConfig()))
    state = jax.tree.map(lambda x: jax.numpy.asarray(rng.uniform(0.5, 1, x.shape), x.dtype), state)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    checkpoints = Checkpoints(workdir / "checkpoints", CheckpointConfig())
    checkpoints.save(1, state, {"samples": 16})
    checkpoints.close()
    return state


@pytest.mark.parametrize("changes", [{}, {"skip_norm_ratio": 10.0}])
def test_a_run_is_loaded_with_its_averaged_weights(changes, tmp_path):
    state = averaged_run(tmp_path, **changes)
    optimizer = state.opt_state.inner if changes else state.opt_state
    assert_identical(load(tmp_path).params, optimizer.ema)


def test_a_run_begins_with_the_tower_that_it_takes_from_another(tmp_path):
    averaged_run(tmp_path)
    config = tiny(init_from=str(tmp_path), init_towers=("image",), model=larger(tiny().model))
    params = begin(config, Program(config.recipe, make_mesh(config.mesh))).params
    taken = starting_params(tmp_path, config.model)  # averages of numbers from 0.5 to 1
    assert_identical(params["visual"], taken["visual"])
    assert np.abs(params["text"]["token_embedding"]).max() < 0.2  # drawn
