"""Files of a run, the clock behind its numbers, and a trace of its steps."""

import json
import math
import struct
import sys
from types import ModuleType
from unittest import mock

import pytest
from etils import epath
from PIL import Image
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog

from clip_jax import metrics
from clip_jax.errors import InputError
from clip_jax.metrics import (
    Goodput,
    Profiler,
    Reports,
    Timers,
    Writer,
    bucket_rates,
    profile_range,
)
from tests.clock import HandClock
from tests.conftest import rows, tiny_digits


def events_in(folder):
    """Read TensorBoard's records: size, its checksum, content, its checksum."""
    (file,) = folder.iterdir()
    content = file.read_bytes()
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def test_rows_and_tensorboard_reach_the_folder(tmp_path):
    writer = Writer(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0)
    writer.write(1, {"loss": 2.0})
    writer.close()
    _, event = events_in(tmp_path / "tensorboard")
    assert (event.step, event.summary.value[0].tag) == (1, "loss")
    assert event.summary.value[0].simple_value == 2.0
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 2.0}
    with mock.patch.object(metrics, "Lines", autospec=True) as lines:
        Writer(tmp_path / "metrics.jsonl", tmp_path / "resumed", 4).close()
    _, event = events_in(tmp_path / "resumed")
    assert (event.step, event.session_log.status) == (5, SessionLog.START)
    lines.return_value.flush.assert_called_once_with()  # until then a bucket has no lines


def test_who_looks_at_tensorboard_sees_what_was_reported_half_a_minute_ago(tmp_path):
    clock = HandClock()
    writer = Writer(tmp_path / "metrics.jsonl", tmp_path / "tensorboard", 0, clock)
    (events,) = (tmp_path / "tensorboard").iterdir()
    writer.flush()
    sizes = [events.stat().st_size]
    for seconds in (0, 29, 2):
        clock.advance(seconds)
        writer.draw(1, {"loss": 2.0})
        sizes.append(events.stat().st_size)
    assert sizes[0] == sizes[1] == sizes[2] < sizes[3]
    writer.close()


def test_tensorboard_gets_the_config_as_text_and_pictures(tmp_path):
    pictures = tmp_path / "evals"
    (pictures / "cars").mkdir(parents=True)
    Image.new("RGBA", (6, 4), "red").save(pictures / "cars/errors.png")
    (pictures / "results.csv").write_text("a table")
    config = {"seed": 3, "wandb_project": None}
    writer = Writer(tmp_path / "rows", tmp_path / "tensorboard", 0, config=config)
    writer.show(7, pictures)
    writer.close()
    _, text, picture = events_in(tmp_path / "tensorboard")
    assert text.summary.value[0].metadata.plugin_data.plugin_name == "text"
    assert b'"seed": 3' in text.summary.value[0].tensor.string_val[0]
    (value,) = picture.summary.value
    assert (picture.step, value.tag) == (7, "cars/errors")
    assert (value.image.width, value.image.height, value.image.colorspace) == (6, 4, 3)


class Wandb(ModuleType):
    """What a run uses of wandb, with its signatures; lists what was logged and how runs ended."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.runs, self.logged, self.ended = [], [], []
        self.Image = type

    def init(self, *, project: str, id: str, name: str, config: dict, dir: str, resume: str):
        if project == "no key":
            raise self.Error("No API key configured.")
        self.runs.append((project, id, name, config["seed"], resume))
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict) -> None:
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.ended.append(exit_code)


def test_wandb_gets_metrics_config_and_pictures_of_one_run_over_all_starts(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    pictures = tmp_path / "evals"
    pictures.mkdir()
    Image.new("RGB", (6, 4)).save(pictures / "predictions.png")

    def opened(project: str) -> Writer:
        config = {"seed": 3, "wandb_project": project}
        return Writer(tmp_path / "rows", tmp_path / "board", 0, config=config)

    for failed in (True, False):
        writer = opened("clip")
        writer.write(1, {"loss": 2.0})
        writer.show(1, pictures)
        writer.close(failed=failed)
    first, again = wandb.runs
    assert first == again == ("clip", first[1], tmp_path.name, 3, "allow")
    assert wandb.logged[:2] == [{"step": 1, "loss": 2.0}, {"step": 1, "predictions": Image.Image}]
    assert wandb.ended == [1, 0]
    with pytest.raises(InputError, match=r"No API key configured\. WANDB_MODE=offline"):
        opened("no key")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"pip install 'clip-jax-pods\[wandb\]'"):
        opened("clip")


def test_a_report_tells_how_long_it_compiled_and_when_the_run_ends(tmp_path, capsys):
    clock, config = HandClock(), tiny_digits(steps=1_000, stop_after=100)
    timers = Timers(clock)
    reports = Reports(epath.Path(tmp_path), timers, config, 0, 1, math.inf)
    reports.begin()
    with reports.compiling():
        clock.advance(12.3)
    clock.advance(10)  # ten steps
    with timers.measure("evaluation"):
        clock.advance(5)
    metrics = {"loss": 4.5, "image_to_text_accuracy": 0.25}
    reports.report(10, metrics)
    reports.close(None)
    assert capsys.readouterr().err.splitlines() == [
        "compiling the training step …",
        "compiled in 12.3 s",
        # 90 steps of a second, and an evaluation of 5 s every 10 steps
        "step 10/100  loss 4.5  in-batch accuracy 25.0%  16 images/s  ETA 2 min 15 s",
    ]


def test_a_failed_evaluation_is_one_of_its_step(tmp_path, capsys):
    """Otherwise a run that recovers would be left out of tables."""
    reports = Reports(
        epath.Path(tmp_path), Timers(HandClock()), tiny_digits(steps=100), 0, 1, math.inf
    )
    reports.evaluated(2, {"failed": "3 of 4 rows"})
    reports.evaluated(2, {"top1": 0.5})
    assert reports.result["failed"] == "3 of 4 rows"
    reports.evaluated(4, {"top1": 0.25})
    assert "failed" not in reports.result
    reports.close(None)
    assert "step 2  failed 3 of 4 rows" in capsys.readouterr().err
    assert rows(tmp_path)[0] == {"step": 2, "failed": "3 of 4 rows"}


def test_result_json_has_the_values_of_one_step_over_all_starts(tmp_path):
    """Otherwise the table of a study has results of earlier steps as if the run ended with them."""
    clock, config = HandClock(), tiny_digits(steps=100)

    def start(step: int) -> Reports:
        reports = Reports(epath.Path(tmp_path), Timers(clock), config, step, 1, math.inf)
        clock.advance(1)
        reports.facts["unique_samples"] = 50
        return reports

    def written(reports: Reports) -> dict[str, float]:
        reports.write_down()
        values = json.loads((tmp_path / "result.json").read_text())
        return {x: value for x, value in values.items() if x != "goodput" and "seconds/" not in x}

    first = start(0)
    first.report(10, {"loss": 3.0})
    first.evaluated(10, {"retrieval": 0.5})
    first.evaluated(10, {"zero_shot": 0.25})
    of_ten = {"step": 10, "samples_seen": 160, "unique_samples": 50, "loss": 3.0}
    assert written(first) == of_ten | {"retrieval": 0.5, "zero_shot": 0.25}
    first.evaluated(15, {"zero_shot": 0.75})
    of_fifteen = {"step": 15, "samples_seen": 240, "unique_samples": 50}
    assert written(first) == of_fifteen | {"zero_shot": 0.75}
    first.close(None)
    resumed = start(5)  # from an older checkpoint, with other evaluators
    assert resumed.result["step"] == 15  # still what the file has
    resumed.report(15, {"loss": 2.0})
    resumed.evaluated(15, {"retrieval": 0.125})
    assert written(resumed) == of_fifteen | {"loss": 2.0, "retrieval": 0.125}
    resumed.close(None)


def test_a_full_disk_is_one_message_of_tensorboard_too(tmp_path):
    full, board = open("/dev/full", "wb"), tmp_path / "tensorboard"  # noqa: SIM115
    with mock.patch.object(record_writer, "open_file", autospec=True, return_value=full):
        writer = Writer(tmp_path / "metrics.jsonl", board, 0)
    writer.draw(1, {"loss": 2.0})
    for ends in (writer.flush, writer.close):
        with pytest.raises(InputError, match=rf"^no space left for {board}: free some"):
            ends()
    with pytest.raises(OSError, match="No space left"):
        full.close()


def test_seconds_are_summed_by_activity_since_the_start_and_since_the_last_lap():
    clock = HandClock()
    timers = Timers(clock)
    clock.advance(1)
    with timers.measure("input"):
        clock.advance(2)
    assert timers.lap() == (3, {"input": 2})
    with timers.measure("input"), timers.measure("save"):
        clock.advance(4)
    assert timers.lap() == (4, {"input": 4, "save": 4})
    assert timers.total == {"input": 6, "save": 4}
    assert timers.elapsed() == 7


def test_goodput_adds_up_over_starts_and_knows_what_was_lost():
    clock = HandClock()
    timers = Timers(clock)
    timers.total |= {"init": 1.0, "compile": 2.0, "save": 0.5}
    clock.advance(10)
    earlier = {"seconds/steps": 100.0, "seconds/init": 5.0, "seconds/lost": 1.0, "other": "x"}
    goodput = Goodput(timers, earlier, steps_kept=90.0)
    values = goodput.values()
    assert values["seconds/init"] == 6.0
    assert values["seconds/lost"] == 11.0  # ten seconds of steps after the checkpoint
    assert values["seconds/steps"] == 90 + 6.5
    assert values["seconds/total"] == 6 + 2 + 0.5 + 11 + 96.5
    assert values["goodput"] == pytest.approx(96.5 / 116)
    assert goodput.describe() == (
        "goodput 83.2%; seconds: init 6.0, compile 2.0, save 0.5, steps 96.5, lost 11.0"
    )
    untouched = Goodput(timers, earlier, steps_kept=math.inf).values()
    assert untouched["seconds/lost"] == 1.0


def test_a_profile_of_some_steps_lands_in_the_work_directory(tmp_path):
    for wrong in ("10", "5:3", "0:3", "a:b", "1:2:3"):
        with pytest.raises(InputError, match="profile_steps"):
            profile_range(wrong)
    profiler = Profiler("2:2", epath.Path(tmp_path))
    ended = []
    for step in range(1, 4):
        profiler.before(step)
        ended.append(profiler.after(step, None))
    assert ended == [False, True, False]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_reading_from_buckets_is_reported_a_second():
    counts = {"requests": 6, "bytes_read": 300, "bytes_used": 200, "seconds_waited": 4}
    assert bucket_rates(counts, seconds=2) == {
        "bucket_requests_per_second": 3,
        "bucket_bytes_per_second": 150,
        "bytes_read_per_byte_used": 1.5,
        "bucket_wait": 2,
    }
    assert not bucket_rates(counts | {"requests": 0}, seconds=2)
