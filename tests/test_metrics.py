"""Files of a run, on a disk and in a bucket; the clock; what people see."""

import json
import math
import sys

import pytest
from etils import epath

from clip_jax import metrics
from clip_jax.checkpoint import Checkpoints
from clip_jax.metrics import Clock, Display, Goodput, Lines, Profiler, Writer, profile_range
from clip_jax.train import Preempted, train
from tests.bucket import Bucket, fake_bucket
from tests.runs import tiny_digits


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.fixture(params=["disk", "bucket"])
def folder(request, tmp_path, monkeypatch):
    return epath.Path(tmp_path) if request.param == "disk" else fake_bucket(monkeypatch)


def test_lines_grow_and_a_resumed_run_drops_what_it_will_redo(folder):
    lines = Lines(folder / "a.jsonl", 0)
    lines.write({"step": 1}, {"step": 2})
    lines.write({"step": 3})
    lines.flush()
    assert steps(folder / "a.jsonl") == [1, 2, 3]
    torn = (folder / "a.jsonl").read_text() + '{"step": 3, "lo'
    (folder / "a.jsonl").write_text(torn)
    resumed = Lines(folder / "a.jsonl", 2)
    assert [row["step"] for row in resumed.rows] == [1, 2] == steps(folder / "a.jsonl")
    resumed.write({"step": 3})
    resumed.flush()
    assert steps(folder / "a.jsonl") == [1, 2, 3]
    Lines(folder / "a.jsonl", 0)
    assert not (folder / "a.jsonl").read_text()


def test_a_bucket_is_written_now_and_then_and_whole(monkeypatch):
    folder = fake_bucket(monkeypatch)
    lines = Lines(folder / "a.jsonl", 0)
    for step in range(100):
        lines.write({"step": step})
    assert not Bucket.writes
    monkeypatch.setattr(metrics, "_UPLOAD_SECONDS", 0)
    lines.write({"step": 100})
    assert len(Bucket.writes) == 1
    assert len(steps(folder / "a.jsonl")) == 101


def test_tensorboard_reaches_the_folder(folder):
    writer = Writer(folder, 0)
    writer.write(1, {"loss": 2.0})
    writer.close()
    assert [path.name.startswith("events") for path in (folder / "tensorboard").iterdir()] == [True]
    assert steps(folder / "metrics.jsonl") == [1]


def test_a_run_in_a_bucket_goes_on(tmp_path, monkeypatch):
    """Everything but the arrays, which Orbax itself puts into buckets, past epath."""
    workdir = fake_bucket(monkeypatch)
    monkeypatch.setattr(
        "clip_jax.train.Checkpoints",
        lambda directory, config: Checkpoints(tmp_path / directory.name, config),
    )
    config = tiny_digits(steps=8, evals=tiny_digits().evals)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "reached_preemption", lambda self, step: step == 4)
        with pytest.raises(Preempted, match="saved in gs://bucket/run"):
            train(config, workdir)
    assert steps(workdir / "metrics.jsonl") == [1, 2, 3, 4]
    result = train(config, "gs://bucket/run")
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


def test_under_jupyter_lines_go_to_the_stream_and_not_into_the_page(monkeypatch, capsys):
    shell = type("ZMQInteractiveShell", (), {})
    monkeypatch.setattr("builtins.get_ipython", shell, raising=False)
    shown = []
    fake = type(sys)("IPython.display")
    fake.display = lambda *args, **kwargs: shown.append(args)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    Display(10).line("step 1")
    assert capsys.readouterr().err == "step 1\n"
    assert not shown
