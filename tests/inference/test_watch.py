"""`evaluate RUN --watch`: each checkpoint once, the oldest first, until the run has ended."""

import json
import shutil
from unittest import mock

import pytest
from etils import epath

from clip_jax import processes
from clip_jax.checkpoints.claim import Claim
from clip_jax.checkpoints.retention import WATCH, WATCHED, Unusable
from clip_jax.cli.commands import main
from clip_jax.config import Config
from clip_jax.errors import InputError
from clip_jax.evals.ranks import NotFinite
from clip_jax.inference import evaluate, watch
from clip_jax.inference.evaluate import EvaluateConfig
from clip_jax.optim import OptimConfig
from clip_jax.scaling import collect
from clip_jax.serialize import to_dict
from clip_jax.storage import files
from tests.clock import HandClock
from tests.conftest import TINY, rows


class MadeUp(HandClock):
    """A run whose last step is 6, of empty checkpoints, what is asked of them, and the clock.

    `later` are what happens while the watcher waits, a function for each time.
    """

    def __init__(self, workdir, *steps) -> None:
        super().__init__()
        self.workdir, self.opened, self.later = workdir, [], []
        self.unusable, self.not_finite, self.deleted = {}, {}, set()
        self.start(None)
        result = {"step": 6, "samples_seen": 6144}
        files.write_whole(workdir / "result.json", json.dumps(result))
        self.save(*steps)

    def start(self, end):
        config = Config(model=TINY, steps=6, stop_after=end, optim=OptimConfig(warmup_steps=1))
        files.write_whole(self.workdir / "config.json", json.dumps(to_dict(config)))

    def save(self, *steps):
        for step in steps:
            (self.workdir / f"checkpoints/{step}").mkdir(parents=True)

    def delete(self, *steps):
        for step in steps:
            (self.workdir / f"checkpoints/{step}").rmdir()

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.later.pop(0)()

    def open_encoder(self, config, run):
        assert run.steps == 6
        step = int(config.model.name.rpartition("@")[2])
        self.opened.append(step)
        if (self.workdir / WATCHED).exists():  # each row is written before the next is opened
            assert rows(self.workdir, WATCHED)[-1]["step"] == self.opened[-2]
        self.delete(*{step} & self.deleted)
        if error := self.unusable.get(step):
            raise error
        return step

    def run(self, evaluators, encoder, output):
        assert output is None
        if error := self.not_finite.get(encoder):
            raise error
        return {"acc": encoder / 10}

    def watch(self):
        """Watch to the end; return the rows by step: the last of each."""
        with (
            mock.patch.object(watch, "open_encoder", autospec=True, side_effect=self.open_encoder),
            mock.patch.object(evaluate.Evaluators, "run", lambda *a: self.run(*a)),
        ):
            self.last = watch.watch(EvaluateConfig(model=self.workdir), self)
        return {row.pop("step"): row for row in rows(self.workdir, WATCHED)}


@pytest.fixture
def run(tmp_path):
    return MadeUp(tmp_path / "run", 2)


def test_every_checkpoint_is_evaluated_once_until_the_last(run):
    run.later = [lambda: run.save(4), lambda: None, lambda: run.save(5, 6)]
    assert run.watch() == {step: {"acc": step / 10} for step in (2, 4, 5, 6)}
    assert run.opened == [2, 4, 5, 6]
    assert run.slept == [watch.POLL_SECONDS] * 3
    assert run.last == {"acc": 0.6}
    result = json.loads((run.workdir / "result.json").read_text())
    assert result == {"step": 6, "samples_seen": 6144, "acc": 0.6}
    assert list((run.workdir / "tensorboard/watch").iterdir())
    run.watch()
    assert len(run.opened) == 4  # nothing is measured again
    assert run.last == {"acc": 0.6}


def test_a_run_that_stops_early_is_watched_as_far_and_further_when_it_goes_on(run):
    run.start(4)
    run.later = [lambda: run.save(4)]
    run.watch()
    assert run.last == {"acc": 0.4}
    assert "acc" not in json.loads((run.workdir / "result.json").read_text())  # which is of step 6
    run.start(5)
    run.later = [lambda: run.start(None), lambda: run.save(5), lambda: run.save(6)]
    assert set(run.watch()) == {2, 4, 5, 6}


def test_a_run_that_is_gone_is_not_waited_for(run):
    run.later = [lambda: shutil.rmtree(run.workdir)]
    with pytest.raises(InputError, match="is gone"):
        run.watch()


def test_a_row_that_a_kill_has_torn_is_measured_again(run):
    run.save(4, 6)
    curve = run.watch()
    whole = (run.workdir / WATCHED).read_text().splitlines(keepends=True)
    (run.workdir / WATCHED).write_text("".join(whole[:2]) + whole[2][:9])
    with pytest.raises(InputError, match="has evaluated up to step 4 of 6"):
        collect._ours(run.workdir / "result.json")
    run.opened.remove(6)
    assert run.watch() == curve
    assert run.opened == [2, 4, 6]
    assert collect._ours(run.workdir / "result.json")["acc"] == 0.6


def test_what_cannot_be_used_gets_a_row_that_says_why(run, capsys):
    run.save(4, 6)
    run.unusable = {step: Unusable("it is damaged") for step in (2, 4, 6)}
    run.deleted = {4}  # as it is opened
    damaged, gone = {"skipped": "it is damaged"}, {"skipped": "it was deleted before its turn."}
    assert run.watch() == {2: damaged, 4: gone, 6: damaged}
    assert "step 2 is skipped: it is damaged" in capsys.readouterr().err
    assert run.last == {}
    assert "skipped" not in json.loads((run.workdir / "result.json").read_text())
    with pytest.raises(InputError, match="skipped step 6: it is damaged"):
        collect._ours(run.workdir / "result.json")
    del run.unusable[2], run.unusable[6]  # tried again, with the next start
    assert run.watch() == {2: {"acc": 0.2}, 4: gone, 6: {"acc": 0.6}}
    assert run.opened == [2, 4, 6, 2, 6]


def test_a_step_whose_embeddings_are_not_finite_has_failed_and_the_next_is_evaluated(run, capsys):
    run.save(4, 6)
    run.not_finite = {step: NotFinite("3 of 4 rows") for step in (2, 6)}
    assert run.watch() == {
        2: {"failed": "3 of 4 rows"},
        4: {"acc": 0.4},
        6: {"failed": "3 of 4 rows"},
    }
    assert "step 2  failed 3 of 4 rows" in capsys.readouterr().err
    assert run.last == {}
    result = json.loads((run.workdir / "result.json").read_text())
    assert result == {"step": 6, "samples_seen": 6144}
    with pytest.raises(InputError, match="its evaluation of step 6 failed: 3 of 4 rows"):
        collect._ours(run.workdir / "result.json")
    run.watch()
    assert run.opened == [2, 4, 6]  # the same weights have the same embeddings


def test_a_step_that_was_put_aside_and_saved_anew_is_evaluated(run):
    run.unusable = {2: Unusable("it is damaged")}

    def save_anew():
        run.unusable = {}
        run.save(2, 6)

    run.later = [lambda: run.delete(2), save_anew]
    assert run.watch() == {2: {"acc": 0.2}, 6: {"acc": 0.6}}


def test_what_is_wrong_with_the_command_marks_no_step(run):
    run.unusable = {2: InputError("no such mesh")}
    with pytest.raises(InputError, match="no such mesh"):
        run.watch()
    assert not (run.workdir / WATCHED).exists()


def test_one_watches_a_run_and_a_run_it_must_be(run, tmp_path, capsys):
    with Claim(epath.Path(run.workdir) / WATCH, "watching") as claim:
        claim.take()
        assert main(["evaluate", str(run.workdir), "--watch"]) == 2
    assert "is watching in" in capsys.readouterr().err
    for model in (tmp_path, f"{run.workdir}@2"):
        assert main(["evaluate", str(model), "--watch"]) == 2
        assert "--watch needs a run directory" in capsys.readouterr().err


def test_what_one_process_cannot_use_none_uses():
    assert processes.together(lambda: 7, Unusable) == 7
    with mock.patch.object(processes, "gather", autospec=True) as gather:
        gather.side_effect = lambda mine: [mine, "its disk is broken"]
        with pytest.raises(Unusable, match="its disk is broken"):
            processes.together(lambda: 7, Unusable)
    with pytest.raises(InputError, match="no mesh"), mock.patch.object(processes, "gather"):
        processes.together(mock.Mock(side_effect=InputError("no mesh")), Unusable)
