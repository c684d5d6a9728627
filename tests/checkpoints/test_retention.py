"""Which checkpoints a name means, and which of them stay."""

import datetime
import json
import random
from types import SimpleNamespace
from unittest import mock

import pytest

from clip_jax import processes
from clip_jax.checkpoints.retention import (
    WATCH,
    WATCHED,
    CheckpointConfig,
    Retention,
    named_step,
    split_name,
)
from clip_jax.errors import InputError
from clip_jax.storage import files

ACCURACY = {"best": "acc"}
WATCHERS = {"best": "acc", "best_of": "watcher"}


def kept(workdir, steps, best=None, of_run=None, **config):
    """Ask which of made-up steps stay; `of_run` are results that are kept with them."""
    now, of_run = datetime.datetime.min, of_run or {}
    infos = [SimpleNamespace(step=x, time=now, metrics=of_run.get(x)) for x in steps]
    config = {"keep": 2, "keep_unwatched": 2} | config | (best or {})
    policy = Retention(workdir, CheckpointConfig(**config))
    stays = policy.should_preserve(infos, context=None)
    return [step for step, stay in zip(steps, stays, strict=True) if stay]


def write_rows(workdir, *rows):
    (workdir / WATCH).mkdir(parents=True, exist_ok=True)
    (workdir / WATCHED).write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------ which are kept


def test_the_newest_and_the_steps_named_stay(tmp_path):
    assert kept(tmp_path, [1, 2, 3, 4, 5]) == [4, 5]
    assert kept(tmp_path, [1, 2, 3, 4, 5], keep=1, also=(1, 3)) == [1, 3, 5]


def test_the_best_stays(tmp_path):
    of_run = {1: {"acc": 0.2}, 2: {"acc": 0.9}, 3: {"acc": 0.9}, 4: {"acc": float("nan")}}
    of_run |= {5: {"acc": 0.1}, 6: {"loss": 2.0}}
    steps = [*range(1, 9)]
    assert kept(tmp_path, steps, best=ACCURACY, of_run=of_run) == [3, 7, 8]  # of two, the newer
    lowest = ACCURACY | {"best_mode": "min"}
    assert kept(tmp_path, steps, best=lowest, of_run=of_run) == [5, 7, 8]
    assert kept(tmp_path, steps, best=WATCHERS, of_run=of_run) == [7, 8]  # whose are none yet


def test_the_oldest_that_a_watcher_has_not_finished_with_stay(tmp_path):
    steps = [2, 4, 6, 8, 10, 12]
    assert kept(tmp_path, steps) == [10, 12]  # nobody watches
    write_rows(tmp_path)
    assert kept(tmp_path, steps) == [2, 4, 10, 12]
    write_rows(tmp_path, {"step": 2, "acc": 0.1}, {"step": 6, "skipped": "it is damaged"})
    assert kept(tmp_path, steps) == [4, 8, 10, 12]
    assert kept(tmp_path, steps, keep_unwatched=3) == [4, 8, 10, 12]
    with (tmp_path / WATCHED).open("a") as file:
        file.write('{"step": 4, "ac')  # not yet a row
    assert kept(tmp_path, steps) == [4, 8, 10, 12]


def test_a_watchers_best_stays(tmp_path):
    rows = [{"step": 2, "acc": 0.7}, {"step": 4, "acc": 0.3}, {"step": 6, "skipped": "damaged"}]
    write_rows(tmp_path, *rows)
    steps = [2, 4, 6, 8, 10, 12]
    assert kept(tmp_path, steps, keep=1, best=WATCHERS) == [2, 8, 10, 12]
    write_rows(tmp_path, *rows, {"step": 4, "acc": 0.8})  # of two rows the last counts
    assert kept(tmp_path, steps, keep=1, best=WATCHERS) == [4, 8, 10, 12]


@pytest.mark.parametrize("seed", range(20))
def test_in_whatever_order_a_run_and_its_watcher_act(seed, tmp_path):
    """What a watcher turned to stays until its row is written, and the best of that stays.

    The run saves and asks what to keep; only later does it delete. The watcher looks for the
    oldest step without a row, and writes its row some time later; it may be killed in between.
    All it can lose is what the run was about to delete when it looked.
    """
    drawn, steps, rows, lost = random.Random(seed), [1], [], set()
    read, doomed = None, []
    write_rows(tmp_path)
    while steps[-1] < 30 or len(rows) < 10:
        act = drawn.choice(["save", "delete", "look", "row", "kill"])
        if act == "save" and not doomed:
            steps.append(steps[-1] + 1)
            stay = kept(tmp_path, steps, best=WATCHERS)
            doomed = [step for step in steps if step not in stay]
        elif act == "delete":
            steps, doomed = [step for step in steps if step not in doomed], []
        elif act == "look" and read is None:
            finished = {row["step"] for row in rows}
            read = next((step for step in steps if step not in finished), None)
            lost |= {read} & {*doomed}
        elif act == "row" and read is not None:
            rows.append({"step": read} | ({"acc": drawn.random()} if read in steps else {}))
            write_rows(tmp_path, *rows)
            read = None
        elif act == "kill":
            read = None
        assert read is None or read in {*steps, *lost}
        known = [(row["acc"], row["step"]) for row in rows if row["step"] not in lost]
        assert not known or max(known)[1] in steps


def test_of_several_processes_the_first_looks_for_all(tmp_path):
    write_rows(tmp_path)
    first = [[2], [{"acc": 0.5}, {}, {}, {}]]  # as JSON brings it
    with (
        mock.patch.object(processes, "is_lead", autospec=True, return_value=False),
        mock.patch.object(processes, "gather", autospec=True, return_value=[first, None]),
    ):
        assert kept(tmp_path, [1, 2, 3, 4], keep=1, best=WATCHERS) == [1, 2, 4]


@pytest.mark.parametrize("name", ["", " "])
def test_the_best_of_a_result_without_a_name_is_refused(name):
    """Else no result has that name, and a run keeps no best checkpoint."""
    with pytest.raises(InputError, match=r"^checkpoint\.best is empty; set it to the name"):
        CheckpointConfig(best=name)
    assert CheckpointConfig(best="acc").best == "acc"


# ------------------------------------------------------------------ names


def run_with(workdir, steps, **checkpoint):
    """Write a run's config, and add empty checkpoints."""
    files.write_whole(workdir / "config.json", json.dumps({"checkpoint": checkpoint}))
    for step in steps:
        (workdir / f"checkpoints/{step}").mkdir(parents=True)
    return workdir


def test_what_stands_behind_a_run_names_a_step(tmp_path):
    best = {"best": "acc", "best_mode": "max", "best_of": "run"}
    run = run_with(tmp_path / "run", [10, 1, 2, 3, 4], **best)
    assert (named_step(run, ""), named_step(run, "4")) == (10, 4)
    results = {1: '{"acc": 0.2}', 2: '{"acc": 0.9}', 3: '{"acc": 0.9}', 4: '{"ac'}
    for which, message in (
        ("7", "has checkpoints of steps 1, 2, 3, 4, 10, not of 7"),
        ("best", "none of its checkpoints has a finite acc yet"),
    ):
        with pytest.raises(InputError, match=message):
            named_step(run, which)
    for step, text in results.items():
        files.write_whole(run / f"checkpoints/{step}/metrics/metrics", text)
    assert named_step(run, "best") == 3  # of two, the newer
    run_with(run, [], **best | {"best_mode": "min"})
    assert named_step(run, "best") == 1
    run_with(run, [], **best | {"best_of": "watcher"})
    write_rows(run, {"step": 1, "acc": 0.2}, {"step": 3, "acc": 0.5}, {"step": 9, "acc": 1.0})
    assert named_step(run, "best") == 3  # step 9 is no longer kept
    with pytest.raises(InputError, match=r"without --checkpoint\.best"):
        named_step(run_with(run, []), "best")
    with pytest.raises(InputError, match="has no checkpoint; wait"):
        named_step(run_with(tmp_path / "empty", []), "")


def test_a_path_that_exists_is_itself(tmp_path):
    (tmp_path / "a@2").mkdir()
    for path, expected in {
        "a@2": ("a@2", ""),
        "run@2": ("run", "2"),
        "run@best": ("run", "best"),
        "run@newest": ("run@newest", ""),
        "a@2/run": ("a@2/run", ""),
    }.items():
        assert split_name(tmp_path / path) == (tmp_path / expected[0], expected[1])
