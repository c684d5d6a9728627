"""Files of a run, on a disk and in a bucket; the clock; what people see."""

import json
import math

import pytest
from etils import epath

from clip_jax.checkpoint import CheckpointConfig, Checkpoints
from clip_jax.metrics import Board, Clock, Goodput, Profiler, Writer, profile_range
from clip_jax.refused import Refused
from clip_jax.train import Preempted, train
from tests.conftest import tiny_digits


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture(params=["disk", "gs"])
def folder(request, tmp_path):
    if request.param == "disk":
        return epath.Path(tmp_path)
    return epath.Path(request.getfixturevalue("gs").url) / "run"


def test_tensorboard_reaches_the_folder(folder):
    writer = Writer(folder / "metrics.jsonl", folder / "tensorboard", 0, print)
    writer.write(1, {"loss": 2.0})
    writer.close()
    assert [path.name.startswith("events") for path in (folder / "tensorboard").iterdir()] == [True]
    assert steps(folder / "metrics.jsonl") == [1]


def test_a_full_disk_is_one_message_of_tensorboard_too(tmp_path, monkeypatch):
    full = open("/dev/full", "wb")  # noqa: SIM115
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda _: full)
    board = Board(str(tmp_path))
    board.add_scalar("loss", 2.0, 1)
    for ends in (board.flush, board.close):
        with pytest.raises(Refused, match=rf"^no space left for {tmp_path}: free some"):
            ends()


@pytest.mark.long
def test_a_run_in_a_bucket_goes_on(gs):
    workdir = epath.Path(gs.url) / "run"
    config = tiny_digits(steps=8, checkpoint=CheckpointConfig(every_steps=100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 4)
        with pytest.raises(Preempted, match=f"saved in {workdir}"):
            train(config, workdir)
    assert steps(workdir / "metrics.jsonl") == [1, 2, 3, 4]
    result = train(config, f"{gs.url}/run")
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert json.loads((workdir / "result.json").read_text()) == result
    assert (workdir / "evals/predictions.png").read_bytes()[1:4] == b"PNG"
    assert json.loads((workdir / "config.json").read_text())["steps"] == 8
    assert json.loads((workdir / "starts.json").read_text()) == {"step": 4, "starts": 1}
    parts = {name: value for name, value in result.items() if name.startswith("seconds/")}
    total = parts.pop("seconds/total")
    assert sum(parts.values()) == pytest.approx(total)
    assert result["goodput"] == pytest.approx(parts["seconds/steps"] / total)
    assert parts["seconds/compile"] > 0
    assert parts["seconds/restore"] > 0


def test_goodput_adds_up_over_starts_and_knows_what_was_lost():
    clock = Clock()
    clock.total |= {"init": 1.0, "compile": 2.0, "save": 0.5}
    earlier = {"seconds/steps": 100.0, "seconds/init": 5.0, "seconds/lost": 1.0, "other": "x"}
    values = Goodput(clock, earlier, steps_kept=90.0).values()
    assert values["seconds/init"] == 6.0
    assert values["seconds/lost"] == 11.0  # ten seconds of steps after the checkpoint
    assert values["seconds/steps"] == pytest.approx(90.0, abs=1)
    assert values["seconds/total"] == pytest.approx(6 + 2 + 0.5 + 11 + 90, abs=1)
    untouched = Goodput(Clock(), earlier, steps_kept=math.inf).values()
    assert untouched["seconds/lost"] == 1.0


@pytest.mark.parametrize("wrong", ["10", "5:3", "0:3", "a:b", "1:2:3"])
def test_profile_steps_are_checked(wrong):
    with pytest.raises(ValueError, match="profile_steps"):
        profile_range(wrong)
    assert profile_range("10:15") == (10, 15)


def test_a_profile_lands_in_the_work_directory(tmp_path):
    profiler = Profiler("2:3", epath.Path(tmp_path))
    ended = []
    for step in range(1, 6):
        profiler.before(step)
        ended.append(profiler.after(step, None))
    assert ended == [False, False, True, False, False]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
