"""Files that the writer of metrics leaves, and what it sends to wandb."""

import json
import struct
import sys
from types import ModuleType
from unittest import mock

import pytest
from PIL import Image
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog

from clip_jax.errors import InputError
from clip_jax.metrics import tracking
from clip_jax.metrics.tracking import Writer
from tests.clock import HandClock


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
    with mock.patch.object(tracking, "Lines", autospec=True) as lines:
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
