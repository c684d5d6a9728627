"""Which checkpoints a name means, and which of them stay."""

import datetime
import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from clip_jax import processes
from clip_jax.checkpoints.manager import Retention
from clip_jax.checkpoints.retention import (
    WATCH,
    WATCHED,
    CheckpointConfig,
    named_step,
    split_name,
)
from clip_jax.errors import InputError
from clip_jax.storage import files

WATCHERS = {"best": "acc", "best_of": "watcher"}


def kept(workdir, steps, of_run=None, **config):
    """Ask which of made-up steps stay; `of_run` are results that are kept with them."""
    now, of_run = datetime.datetime.min, of_run or {}
    infos = [SimpleNamespace(step=x, time=now, metrics=of_run.get(x)) for x in steps]
    config = {"keep": 2, "keep_unwatched": 2} | config
    policy = Retention(workdir, CheckpointConfig(**config))
    stays = policy.should_preserve(infos, context=None)
    return [step for step, stay in zip(steps, stays, strict=True) if stay]


def write_rows(workdir, *rows):
    (workdir / WATCH).mkdir(parents=True, exist_ok=True)
    (workdir / WATCHED).write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------ which are kept


ACCURACIES = st.fixed_dictionaries(
    {}, optional={"acc": st.sampled_from([0.1, 0.2, 0.9, math.nan, math.inf]), "loss": st.just(2.0)}
)
STEP = st.integers(1, 12)
CONFIGS = st.builds(
    CheckpointConfig,
    keep=st.integers(1, 3),
    keep_unwatched=st.integers(1, 3),
    also=st.lists(STEP, max_size=2).map(tuple),
    best=st.sampled_from(["acc", None]),
    best_mode=st.sampled_from(["max", "min"]),
    best_of=st.sampled_from(["run", "watcher"]),
)


@given(
    steps=st.sets(STEP, min_size=1).map(sorted),
    config=CONFIGS,
    of_run=st.dictionaries(STEP, ACCURACIES),
    rows=st.none() | st.lists(st.tuples(STEP, ACCURACIES), max_size=12),  # None: nobody watches
    incomplete=st.sampled_from(["", '{"step": 4, "ac']),
)
def test_the_newest_the_named_the_best_and_the_unwatched_stay(
    steps, config, of_run, rows, incomplete
):
    """No other step is kept, and applying the rule again deletes nothing."""
    expected, newest_rows = {*steps[-config.keep :], *config.also}, dict(rows or [])
    if rows is not None:
        expected |= {*[x for x in steps if x not in newest_rows][: config.keep_unwatched]}
    results = of_run if config.best_of == "run" else newest_rows
    values = {step: results.get(step, {}).get("acc", math.nan) for step in steps}
    finite = [step for step in steps if math.isfinite(values[step])]
    if config.best and finite:
        sign = 1 if config.best_mode == "max" else -1
        expected |= {max(finite, key=lambda step: (sign * values[step], step))}  # of two, the newer
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder)
        if rows is not None:
            write_rows(workdir, *({"step": step} | row for step, row in rows))
            with (workdir / WATCHED).open("a") as file:
                file.write(incomplete)
        stays = kept(workdir, steps, of_run=of_run, **vars(config))
        assert stays == [step for step in steps if step in expected]
        assert kept(workdir, stays, of_run=of_run, **vars(config)) == stays


class RunAndWatcher(RuleBasedStateMachine):
    """A step that a watcher evaluates is kept until its row is written, and the best one after it.

    The run saves a step and decides which steps to keep; it deletes the others later. The watcher
    chooses the oldest step without a row, and writes its row later; it may be killed in between. It
    can lose only a step that the run had already decided to delete.
    """

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.workdir = Path(self.folder.name)
        self.steps, self.doomed = [1], []  # existing steps, steps to delete
        self.rows, self.read, self.lost = [], None, set()  # state of the watcher
        write_rows(self.workdir)

    def teardown(self):
        self.folder.cleanup()

    @precondition(lambda self: not self.doomed)
    @rule()
    def save(self):
        self.steps.append(self.steps[-1] + 1)
        stay = kept(self.workdir, self.steps, **WATCHERS)
        self.doomed = [step for step in self.steps if step not in stay]

    @rule()
    def delete(self):
        self.steps = [step for step in self.steps if step not in self.doomed]
        self.doomed = []

    @precondition(lambda self: self.read is None)
    @rule()
    def look(self):
        finished = {row["step"] for row in self.rows}
        self.read = next((step for step in self.steps if step not in finished), None)
        self.lost |= {self.read} & {*self.doomed}

    @precondition(lambda self: self.read is not None)
    @rule(accuracy=st.floats(0, 1))
    def write(self, accuracy):
        result = {"acc": accuracy} if self.read in self.steps else {}
        self.rows.append({"step": self.read} | result)
        write_rows(self.workdir, *self.rows)
        self.read = None

    @precondition(lambda self: self.read is not None)
    @rule()
    def kill(self):
        self.read = None

    @invariant()
    def what_is_read_and_the_best_exist(self):
        assert self.read is None or self.read in {*self.steps, *self.lost}
        results = [(row["acc"], row["step"]) for row in self.rows if row["step"] not in self.lost]
        assert not results or max(results)[1] in self.steps


TestRunAndWatcher = RunAndWatcher.TestCase


def test_of_several_processes_the_first_looks_for_all(tmp_path):
    write_rows(tmp_path)
    first = [[2], [{"acc": 0.5}, {}, {}, {}]]  # lists, as after JSON
    with (
        mock.patch.object(processes, "is_lead", autospec=True, return_value=False),
        mock.patch.object(processes, "gather", autospec=True, return_value=[first, None]),
    ):
        assert kept(tmp_path, [1, 2, 3, 4], keep=1, **WATCHERS) == [1, 2, 4]


@pytest.mark.parametrize("name", ["", " "])
def test_the_best_of_a_result_without_a_name_is_refused(name):
    """No result would have this name, so that a run would keep no best checkpoint."""
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
