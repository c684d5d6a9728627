"""Which checkpoints a name means, and which of them stay."""

import dataclasses
import json
import shutil

import jax
import pytest
from etils import epath

from clip_jax import files, retention
from clip_jax.checkpoint import CheckpointConfig, Checkpoints
from clip_jax.cli import main
from clip_jax.loading import load
from clip_jax.refused import Refused
from clip_jax.retention import named_step, reading, split_name, steps_in
from tests.conftest import TINY, write_run

BEST = CheckpointConfig(every_steps=1, keep=2, best="animals/acc1")
ACCURACY = {1: 0.2, 2: 0.9, 3: 0.4, 5: 0.5, 6: 0.1}  # nothing was measured at step 4


def save(workdir, steps, config=BEST, results=ACCURACY):
    """Save made-up steps, each after its evaluation; return which are left."""
    (workdir / "config.json").write_text(
        json.dumps({"checkpoint": dataclasses.asdict(config), "steps": 6})
    )
    checkpoints = Checkpoints(workdir / "checkpoints", config)
    for step in steps:
        found = {config.best: results[step]} if config.best and step in results else {}
        checkpoints.save(step, {"x": jax.numpy.full(4, step)}, {"samples": step}, found)
    checkpoints.close()
    return steps_in(workdir / "checkpoints")


# ------------------------------------------------------------------------------------- names


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, whose weights differ."""
    workdir, _, _ = write_run(TINY, tmp_path_factory.mktemp("runs") / "run")
    return workdir


def test_a_step_is_named_behind_the_run(run, tmp_path, capsys):
    newest, first = load(run).params, load(f"{run}@1").params
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), newest, load(f"{run}@2").params))
    assert (first["logit_scale"] != newest["logit_scale"]).all()
    assert main(["convert", f"{run}@1", str(tmp_path / "one"), "--to", "clip-jax"]) == 0
    assert load(tmp_path / "one").params["logit_scale"] == first["logit_scale"]
    capsys.readouterr()
    for name, says in (
        (f"{run}@7", "keeps the checkpoints of steps 1, 2, not of 7"),
        (f"{run}@best", "without --checkpoint.best"),
        (f"{run}@newest", "there is no"),
        (f"{tmp_path / 'one'}@1", "is no run, which alone has a checkpoint @1"),
    ):
        assert main(["convert", name, str(tmp_path / "two"), "--to", "clip-jax"]) == 2
        assert says in capsys.readouterr().err


def test_a_path_that_exists_is_itself(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "run@1")
    assert split_name(other) == (other, "")
    assert split_name(tmp_path / "run@2") == (tmp_path / "run", "2")
    (tmp_path / "a@2").mkdir()
    assert split_name(tmp_path / "a@2" / "run") == (tmp_path / "a@2" / "run", "")


def test_a_step_in_a_bucket_is_named_behind_the_run(run, gs):
    workdir = epath.Path(gs.url) / "run"
    files.copy_tree(run / "checkpoints", workdir / "checkpoints")
    for step in (1, 2):
        (workdir / f"checkpoints/{step}/commit_success.txt").write_text("committed")
    files.write_whole(workdir / "config.json", (run / "config.json").read_bytes())
    assert load(f"{workdir}@1").params["logit_scale"] == load(f"{run}@1").params["logit_scale"]
    with pytest.raises(Refused, match="steps 1, 2, not of 3"):
        load(f"{workdir}@3")
    assert split_name(epath.Path(f"{gs.url}/a@b/run@best")) == (
        epath.Path(f"{gs.url}/a@b/run"), "best"
    )  # fmt: skip


# ------------------------------------------------------------------------------------- the best


def test_the_best_stays_besides_the_newest_also_after_reopening(tmp_path):
    assert save(tmp_path, [1, 2, 3]) == [2, 3]
    assert save(tmp_path, [4, 5]) == [2, 4, 5]
    assert save(tmp_path, [6]) == [2, 5, 6]
    assert named_step(tmp_path, "best") == 2
    assert named_step(tmp_path, "") == 6


def test_the_lowest_may_be_the_best(tmp_path):
    lowest = dataclasses.replace(BEST, best="info_nce", best_mode="min")
    assert save(tmp_path, [1, 2, 3, 4, 5], lowest) == [1, 4, 5]
    assert named_step(tmp_path, "best") == 1


def test_damaged_results_are_none(tmp_path):
    save(tmp_path, [1, 2, 3])
    (tmp_path / "checkpoints/2/metrics/metrics").write_text('{"anim')
    assert save(tmp_path, [5]) == [3, 5]
    assert named_step(tmp_path, "best") == 5


def test_only_a_better_result_is_saved_beyond_the_usual_steps(tmp_path):
    save(tmp_path, [1, 2])
    checkpoints = Checkpoints(tmp_path / "checkpoints", BEST)
    assert not checkpoints.is_best({})
    assert not checkpoints.is_best({"animals/acc1": 0.9})
    assert not checkpoints.is_best({"animals/acc1": float("nan")})
    assert checkpoints.is_best({"animals/acc1": 0.95})
    checkpoints.close()
    plain = Checkpoints(tmp_path / "checkpoints", CheckpointConfig())
    assert not plain.is_best({"animals/acc1": 0.95})
    plain.close()


def test_steps_where_branches_begin_are_saved_and_stay(tmp_path):
    config = CheckpointConfig(every_steps=4, keep=1, also=(1, 3))
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    assert [step for step in range(1, 9) if checkpoints.should_save(step)] == [1, 3, 4, 8]
    checkpoints.close()
    assert save(tmp_path, [1, 2, 3, 4, 5], config) == [1, 3, 5]


def test_a_watchers_best_stays(tmp_path):
    watched = dataclasses.replace(BEST, best_of="watcher")
    (tmp_path / "evals").mkdir()
    row = {"step": 1, "animals/acc1": 0.7}
    (tmp_path / "evals/watch.jsonl").write_text(json.dumps(row) + '\n{"step": 2, "anim')
    assert save(tmp_path, [1, 2, 3, 4, 5], watched) == [1, 4, 5]
    assert named_step(tmp_path, "best") == 1


# --------------------------------------------------------------------------------- being read


def test_what_is_read_stays_until_it_is_read_or_its_reader_dead(tmp_path, monkeypatch):
    config = CheckpointConfig(every_steps=1, keep=1)
    save(tmp_path, [1], config)
    with reading(tmp_path, 1, over=False) as held:
        assert held
        assert save(tmp_path, [2], config) == [1, 2]
    assert save(tmp_path, [3], config) == [3]
    with reading(tmp_path, 2, over=True) as held:
        assert not held  # it is gone
    (tmp_path / "evals/watch/deleting").write_text('{"steps": [3]}')
    with reading(tmp_path, 3, over=False) as held:
        assert not held  # the run has said that it deletes it
    with reading(tmp_path, 3, over=True) as held:
        assert held  # it will no more

    monkeypatch.setattr(retention, "LEASE_SECONDS", 0)
    mark = tmp_path / "evals/watch/reading/dead"
    mark.write_text('{"step": 3, "beats": 4}')
    checkpoints = Checkpoints(tmp_path / "checkpoints", config)
    for step, left in ((4, [3, 4]), (5, [5])):
        checkpoints.save(step, {"x": jax.numpy.zeros(4)}, {"samples": step})
        checkpoints.wait()
        assert steps_in(tmp_path / "checkpoints") == left
    checkpoints.close()
    assert not mark.exists()
