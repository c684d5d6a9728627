"""What `clip-jax bench` prints."""

import io
import itertools
import json
import tarfile
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from clip_jax import bench, files
from clip_jax.bench import InputBench, describe_compute, describe_input, measure_input
from clip_jax.cli import main
from clip_jax.data.digits import DigitsSource
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.table import TableConfig
from tests.conftest import DIGITS, FLAGS, ROOT

QUICK = ["--seconds", "0.1", "--warmup", "0", "--batch-size", "8"]


def make_slow(monkeypatch, owner, name):
    """Let a function take a second of a clock on which anything else takes milliseconds."""
    calls, plain, looks = [], getattr(owner, name), itertools.count()

    def slow(*args, **how):
        calls.append(name)
        return plain(*args, **how)

    def now():
        return len(calls) + next(looks) / 1000

    monkeypatch.setattr(owner, name, slow)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=now, thread_time=now))


def test_input_of_images_has_every_stage(tmp_path, monkeypatch, capsys):
    make_slow(monkeypatch, bench, "read_crop")
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(tmp_path / "a.jpg")
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "a.jpg,a photo\n" * 9)
    flags = ["--data.source.path", str(tmp_path / "pairs.csv"), "--data.augment.flip", "0.5"]
    assert main(["bench", "input", str(ROOT / "configs/pairs.py"), *QUICK, *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples_per_second"] > 0
    assert list(result["stages"]) == ["read", "decode and crop", "augment", "tokenize"]
    assert result["limit"] == "decode and crop"
    assert all(0 < s["computing"] < 1.1 for s in result["stages"].values())


def test_input_says_which_stage_limits_and_what_to_do(monkeypatch, capsys):
    make_slow(monkeypatch, DigitsSource, "load")
    assert main(["bench", "input", str(DIGITS), *QUICK]) == 0
    printed = capsys.readouterr().out
    assert "limit: read; " in printed
    assert "--data." in printed


def test_input_that_cannot_be_read(tmp_path):
    (tmp_path / "pairs.csv").write_text("image,caption\n" + "gone.jpg,a photo\n" * 9)
    source = TableConfig(path=str(tmp_path / "pairs.csv"))
    with pytest.raises(ValueError, match=r"none of 1024 samples of data\.source"):
        measure_input(InputBench(data=DataConfig(source=source), seconds=0.1))


@pytest.mark.parametrize("what", ["step", "loss"])
def test_step_and_loss_are_timed(what, capsys):
    command = ["bench", what, str(DIGITS), *FLAGS, "--warmup", "0", "--rounds", "2"]
    assert main([*command, "--calls", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples_per_second"] == pytest.approx(16 / result["seconds"])
    assert result["devices"] == 8
    assert result["mfu"] is None  # of a CPU no peak is known
    assert result["peak_bytes"] > 0
    assert result["seconds_fastest"] <= result["seconds"]
    assert "pairs/s" in describe_compute(result)


def test_input_from_a_bucket_says_what_it_asks_for(gs, monkeypatch, capsys):
    ticks = itertools.count()  # fifty looks at the clock are a second, however long they take
    clock = SimpleNamespace(perf_counter=lambda: next(ticks) / 50, thread_time=time.thread_time)
    monkeypatch.setattr(bench, "time", clock)
    rng = np.random.default_rng(0)
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for number in range(40):
            image = io.BytesIO()
            pixels = rng.integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(image, "JPEG")
            for name, data in ((f"{number}.jpg", image.getvalue()), (f"{number}.txt", b"a photo")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    files.write_whole(f"{gs.url}/0.tar", content.getvalue())
    files.write_whole(f"{gs.url}/1.tar", content.getvalue())
    ahead = 1  # MiB
    flags = ["--data.source.path", f"{gs.url}/{{0,1}}.tar", "--data.read-ahead-mib", f"{ahead}"]
    command = ["bench", "input", str(ROOT / "configs/webdataset.py"), *QUICK, "--seconds", "1"]
    assert main([*command, *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["order"] == "stretches"
    assert result["bucket_requests_per_second"] > 0
    read = result["bucket_bytes_per_second"]
    used = read / result["bytes_read_per_byte_used"]
    # Half of a tar of such small images is headers; and the budget, however little was used.
    assert read < 2 * used + ahead * 2**20
    assert used < 2 * read
    assert "bytes read a byte used" in describe_input(result)
