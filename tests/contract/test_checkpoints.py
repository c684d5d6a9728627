"""Checkpoints and run directories wherever they are: on disk, gs:// and s3://."""

import contextlib
import dataclasses
import json
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from clip_jax.checkpoints.claim import Claim
from clip_jax.checkpoints.manager import CheckpointConfig, Checkpoints
from clip_jax.checkpoints.retention import WATCHED, named_step, split_name, steps_in
from clip_jax.cli import commands
from clip_jax.config import Config
from clip_jax.inference import evaluate, loading, watch
from clip_jax.inference.evaluate import EvaluateConfig
from clip_jax.metrics.tracking import Writer
from clip_jax.serialize import to_dict
from clip_jax.storage import bucket as bucket_client
from clip_jax.storage import files
from clip_jax.storage.json_files import Lines, read_rows
from tests.clock import HandClock
from tests.conftest import TINY, parameters
from tests.contract.conftest import FEW, PAIRS, write_pictures

EVERY = CheckpointConfig(every_steps=1, keep=2)
BEST = dataclasses.replace(EVERY, best="acc")


@pytest.fixture
def workdir(folder):
    return epath.Path(files.as_path(folder))


def make_state(step, shape=(4, 2)):
    """An array that differs from step to step, over eight devices."""
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))
    w = np.random.default_rng(step).standard_normal((8, 4), np.float32)
    return {"w": jax.device_put(w, NamedSharding(mesh, PartitionSpec("a", "b")))}


def save(workdir, *steps, config=EVERY, results=None):
    checkpoints = Checkpoints(workdir / "checkpoints", config)
    for step in steps:
        known = {"acc": results[step]} if results and step in results else {}
        checkpoints.save(step, make_state(step), {"samples": 16 * step}, known)
    checkpoints.close()
    return steps_in(workdir / "checkpoints")


def restore(workdir, config=EVERY):
    with contextlib.closing(Checkpoints(workdir / "checkpoints", config)) as checkpoints:
        return checkpoints.restore(make_state(0, shape=(2, 4)))  # of another mesh


def assert_is(restored, step):
    assert (restored.step, restored.position) == (step, {"samples": 16 * step})
    np.testing.assert_array_equal(restored.state["w"], make_state(step)["w"])


def test_the_newest_and_the_best_are_kept_and_restored(workdir):
    assert save(workdir, 1, 2, 3, config=BEST, results={1: 0.2, 2: 0.9, 3: 0.4}) == [2, 3]
    assert save(workdir, 4, 5, config=BEST, results={5: 0.5}) == [2, 4, 5]
    assert_is(restore(workdir, BEST), 5)
    config = {"checkpoint": dataclasses.asdict(BEST)}
    files.write_whole(workdir / "config.json", json.dumps(config))
    assert named_step(workdir, "best") == 2
    assert split_name(files.as_path(f"{workdir}@best")) == (files.as_path(workdir), "best")
    checkpoints = Checkpoints(workdir / "checkpoints", BEST)
    assert checkpoints.is_best({"acc": 0.95})
    for results in ({}, {"acc": 0.9}, {"acc": float("nan")}):
        assert not checkpoints.is_best(results)
    checkpoints.close()
    files.write_whole(workdir / "checkpoints/2/metrics/metrics", '{"acc')  # damaged
    assert save(workdir, 6, config=BEST, results={6: 0.1}) == [5, 6]


def test_a_damaged_checkpoint_is_put_aside_and_an_older_one_taken(workdir, capfd):
    save(workdir, 2, 3)
    files.write_whole(workdir / "damaged/3/state", "an earlier one")
    for path in files.walk(workdir / "checkpoints/3/state"):
        if "/d/" in path:  # its arrays
            files.remove(path)
    found = restore(workdir)
    assert_is(found, 2)
    (line,) = found.messages
    assert line.startswith("the checkpoint of step 3 is damaged (")
    assert line.endswith(f"it was moved to {workdir}/damaged/3-2")
    assert "Traceback" not in capfd.readouterr().err
    assert steps_in(workdir / "checkpoints") == [2]
    assert list(files.walk(workdir / "damaged/3-2"))
    assert restore(workdir).messages == ()


def test_a_step_whose_save_ended_early_is_never_taken(bucket):
    """Last of all is written the mark that it is whole."""
    workdir = files.as_path(f"{bucket.url}/run")
    save(workdir, 1)
    bucket.server.requests()
    save(workdir, 2)
    writes = [x["path"] for x in bucket.server.requests() if x["method"] in ("PUT", "POST")]
    of_step = [path for path in writes if re.search(r"checkpoints(/|%2F)2(/|%2F)", path)]
    marks = [i for i, path in enumerate(of_step) if re.search("2(/|%2F)commit_success", path)]
    assert marks == [*range(marks[0], len(of_step))]
    for path in files.walk(workdir / "checkpoints/2"):
        if "/2/commit_success" in path:
            files.remove(path)
    assert list(files.walk(workdir / "checkpoints/2"))
    assert steps_in(workdir / "checkpoints") == [1]
    assert_is(restore(workdir), 1)
    assert save(workdir, 2) == [1, 2]
    assert_is(restore(workdir), 2)


def test_the_lease_of_the_dead_is_taken_over(bucket, capsys):
    workdir = files.as_path(f"{bucket.url}/run")
    content = {"host": "far", "pid": 7, "id": "dead"}
    files.write_whole(workdir / "lease/000000000003", json.dumps(content))
    clock = HandClock(skips=True)
    with Claim(workdir, clock=clock) as claim:
        claim.take()
        assert sum(clock.slept) == 46
        assert "leased to process 7 on far" in capsys.readouterr().err
        assert list(files.walk(workdir / "lease")) == [f"{workdir}/lease/000000000004"]


def test_lines_are_written_once_a_minute_and_at_the_end(bucket):
    path, clock = files.as_path(f"{bucket.url}/run/a.jsonl"), HandClock()
    lines = Lines(path, 0, clock)
    for step in range(100):
        lines.write({"step": step})
    assert not path.exists()
    clock.advance(61)
    lines.write({"step": 100})
    lines.write({"step": 101})
    assert [row["step"] for row in read_rows(path)] == [*range(101)]
    lines.flush()
    files.write_whole(path, path.read_bytes() + b'{"step": 102, "lo')
    resumed = Lines(path, 50, clock)
    resumed.write({"step": 51})
    resumed.flush()
    assert [row["step"] for row in read_rows(path)] == [*range(52)]
    board = files.as_path(f"{bucket.url}/board")
    writer = Writer(path, board, 10)
    writer.write(11, {"loss": 2.0})
    writer.close()
    assert [row["step"] for row in read_rows(path)] == [*range(12)]
    assert list(board.iterdir())


def test_a_run_keeps_what_its_watcher_has_yet_to_read(gs):
    """Both at once: the watcher's sleep lets the run save on, also while it evaluates.

    tests/workflow has both on disk; the tests above have each operation in buckets of both kinds.
    """
    workdir = files.as_path(f"{gs.url}/run")
    config = Config(
        model=TINY,
        steps=6,
        checkpoint=dataclasses.replace(BEST, keep=1, keep_unwatched=1, best_of="watcher"),
    )
    files.write_whole(workdir / "config.json", json.dumps(to_dict(config)))
    checkpoints = Checkpoints(workdir / "checkpoints", config.checkpoint)
    params = jax.tree.map(jnp.asarray, parameters(TINY))
    steps, accuracy, looks = iter(range(1, 7)), {1: 0.2, 3: 0.9, 5: 0.3, 6: 0.1}, []

    def save(*_):
        if step := next(steps, None):
            scaled = params | {"logit_scale": jnp.float32(step)}
            checkpoints.save(step, {"params": scaled}, {"samples": step})
            checkpoints.wait()

    def run(evaluators, encoder, output):
        step = int(encoder.params["logit_scale"])
        save()
        save()
        looks.append(steps_in(workdir / "checkpoints"))
        return {"acc": accuracy[step]}

    with (
        mock.patch.object(HandClock, "sleep", save),
        mock.patch.object(evaluate.Evaluators, "run", run),
    ):
        assert watch.watch(EvaluateConfig(model=workdir), HandClock()) == {"acc": 0.1}
    checkpoints.close()
    assert looks == [[1, 3], [1, 3, 5], [3, 5, 6], [3, 5, 6]]
    rows = [{"step": step, "acc": value} for step, value in accuracy.items()]
    assert read_rows(workdir / WATCHED) == rows
    assert named_step(workdir, "best") == 3
    result = {"step": 6, "samples_seen": config.samples_after(6), "acc": 0.1}
    assert json.loads((workdir / "result.json").read_text()) == result
    assert list(files.walk(workdir / "tensorboard/watch"))


def test_a_run_whose_data_go_away_ends_with_75_and_its_checkpoint_is_whole(gs, tmp_path, capfd):
    table, plain = write_pictures(f"{gs.url}/pairs", 16), Checkpoints.save

    def save(checkpoints, step, *rest):
        plain(checkpoints, step, *rest)
        checkpoints.wait()
        gs.server.behave(faults={"503": 1.0})

    run = ("--workdir", f"{tmp_path}/run", "--data.source.path", table)
    with (
        mock.patch.object(bucket_client, "RETRY_SECONDS", 1),
        mock.patch.object(Checkpoints, "save", autospec=True, side_effect=save),
    ):
        bucket_client._bucket.cache_clear()
        assert commands.main(["train", PAIRS, *run, *FEW, "--steps", "1000000"]) == 75
    line = capfd.readouterr().err.splitlines()[-1]
    assert re.match(rf"clip-jax: {gs.url}/.* cannot be read: no good answer.*are intact\.$", line)
    gs.server.behave()
    params = loading.load(tmp_path / "run").params
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
