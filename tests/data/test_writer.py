"""clip-jax prepare: what is kept, what is dropped and why, and what an interruption leaves."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from clip_jax.data import writer
from clip_jax.data.sources.array_record import ArrayRecordConfig, ArrayRecordSource
from clip_jax.data.writer import PrepareConfig, guess_source, inspect, prepare

from . import formats


def encoded(width, height):
    file = io.BytesIO()
    Image.new("RGB", (width, height), "green").save(file, "PNG")
    return file.getvalue()


PAIRS = [(f"{i:02d}.png", encoded(10 + i, 20), f"text {i}") for i in range(20)]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return formats.tar(tmp_path / "source", PAIRS).path


def read_all(folder):
    source = ArrayRecordSource(ArrayRecordConfig(path=str(folder / "*.array_record")))
    return [source.load(i, np.random.default_rng(0)) for i in range(len(source))]


def test_parts_together_write_every_pair_verbatim(source, tmp_path):
    folder = tmp_path / "out"
    for part in ("0/2", "1/2"):
        prepare(PrepareConfig(source=source, destination=folder, samples_per_shard=6, part=part))
    assert read_all(folder) == [(image, text) for _, image, text in PAIRS]
    assert len(list(folder.glob("*.array_record"))) == 4
    assert not list(folder.glob("*.partial"))
    with Image.open(folder / "contact_sheet.png") as sheet:
        assert sheet.width > 100


def test_what_is_dropped_is_counted_by_reason(tmp_path):
    pairs = [*PAIRS[:3], ("a.png", b"broken", "x"), ("b.png", encoded(300, 4), "x")]
    pairs += [("c.png", encoded(9, 900), "x"), ("d.png", encoded(50, 50), "long " * 9)]
    (tmp_path / "in").mkdir()
    config = PrepareConfig(
        source=formats.images_beside(tmp_path / "in", pairs).path,
        destination=tmp_path / "out",
        min_side=8,
        max_aspect=20.0,
        max_caption=40,
    )
    counts = prepare(config)["counts"]
    reasons = ("not an image", "image side", "image aspect", "caption length")
    assert counts == {"kept": 3, **dict.fromkeys(reasons, 1)}
    assert len(read_all(tmp_path / "out")) == 3


def test_an_interrupted_run_goes_on_and_leaves_no_half_shard(source, tmp_path, monkeypatch):
    config = PrepareConfig(
        source=source, destination=tmp_path / "out", samples_per_shard=6, threads=1
    )
    read, done = writer._read, []

    def stop(source, index, config):
        if len(done) == 14:
            raise KeyboardInterrupt
        done.append(index)
        return read(source, index, config)

    monkeypatch.setattr(writer, "_read", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(config)
    assert [path.name[:11] for path in sorted((tmp_path / "out").glob("*.array_record"))] == [
        "pairs-00000",
        "pairs-00001",
    ]
    done.clear()
    monkeypatch.setattr(writer, "_read", lambda *args: done.append(args[1]) or read(*args))
    assert prepare(config)["counts"] == {"kept": 20}
    assert sorted(done) == list(range(12, 20))
    assert read_all(tmp_path / "out") == [(image, text) for _, image, text in PAIRS]
    with pytest.raises(ValueError, match="begun with other settings"):
        prepare(PrepareConfig(source=source, destination=tmp_path / "out", min_side=9))


def test_large_images_are_made_smaller(source, tmp_path):
    prepare(PrepareConfig(source=source, destination=tmp_path / "out", resize=12))
    sizes = [Image.open(io.BytesIO(image)).size for image, _ in read_all(tmp_path / "out")]
    assert sizes[0] == (10, 20)
    assert sizes[5] == (12, 16)


def test_inspect_shows_the_first_samples(source, tmp_path):
    found = inspect(PrepareConfig(source=source, destination=tmp_path / "look"))
    assert found["samples"] == found["counts"]["kept"] == 20
    assert found["first"][1]["caption"] == "text 1"
    assert found["first"][1]["size"] == [11, 20]
    assert (tmp_path / "look/contact_sheet.png").exists()
    json.dumps(found)


@pytest.mark.parametrize("format", formats.FORMATS)
def test_the_format_is_told_by_the_path(format, tmp_path):
    config = formats.FORMATS[format](tmp_path, PAIRS[:2])
    assert type(guess_source(config.path)) is type(config)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"part": "2/2"}, "part='2/2'"), ({"samples_per_shard": 0}, "samples_per_shard=0")],
)
def test_wrong_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(source="x.tar", **wrong)
    with pytest.raises(ValueError, match="is no source"):
        guess_source("x.zip")
