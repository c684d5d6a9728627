"""clip-jax prepare: what is kept, what is dropped and why, and what an interruption leaves."""

import io
import json
from typing import Any
from unittest import mock

import pytest
from PIL import Image

from clip_jax.cli.commands import main
from clip_jax.data.sources.any import PathConfig, guess_source
from clip_jax.errors import InputError
from clip_jax.prepare.filters import Filter
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import describe, prepare
from tests.data.conftest import FORMATS
from tests.prepare.conftest import digests, encoded, records

PAIRS = [(f"{i:02d}.png", encoded(10 + i, 20), f"text {i}") for i in range(20)]
READ = Filter.read


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    return FORMATS["tar"](tmp_path / "source", PAIRS).path


def read_all(folder):
    return [(x["image"][0], x["caption"][0].decode()) for x in records(folder)]


def test_what_is_dropped_is_counted_by_reason(tmp_path):
    """Of tars in a folder, whose captions are in JSON."""
    pairs = [*PAIRS[:3], ("a.png", b"broken", "x"), ("b.png", encoded(300, 4), "x")]
    pairs += [("c.png", encoded(9, 900), "x"), ("d.png", encoded(50, 50), "long " * 9)]
    (tmp_path / "in").mkdir()
    FORMATS["tar_json"](tmp_path / "in", pairs)
    how: dict[str, Any] = {"source": str(tmp_path / "in"), "caption_column": "caption"}
    how |= {"destination": tmp_path / "out", "min_side": 8, "max_aspect": 20.0, "max_caption": 40}
    counts = prepare(PrepareConfig(**how))["counts"]
    reasons = ("not an image", "image side", "image aspect", "caption length")
    assert counts == {"kept": 3, **dict.fromkeys(reasons, 1)}
    assert read_all(tmp_path / "out") == [(image, text) for _, image, text in PAIRS[:3]]


def test_an_interrupted_run_goes_on_and_leaves_no_half_shard(source, tmp_path):
    how = {"source": source, "destination": tmp_path / "out"}
    config = PrepareConfig(**how, samples_per_shard=6, threads=1)
    done = []

    def stop(self, index, *pair):
        if len(done) == 14:
            raise KeyboardInterrupt
        done.append(index)
        return READ(self, index, *pair)

    with (
        mock.patch.object(Filter, "read", autospec=True, side_effect=stop),
        pytest.raises(KeyboardInterrupt),
    ):
        prepare(config)
    shards = sorted((tmp_path / "out").glob("*.array_record"))
    assert [path.name[:11] for path in shards] == ["pairs-00000", "pairs-00001"]
    with mock.patch.object(Filter, "read", autospec=True, side_effect=READ) as read:
        assert prepare(config)["counts"] == {"kept": 20}
    assert sorted(call.args[1] for call in read.call_args_list) == list(range(12, 20))
    assert read_all(tmp_path / "out") == [(image, text) for _, image, text in PAIRS]
    with pytest.raises(ValueError, match="created with other settings"):
        prepare(PrepareConfig(**how, min_side=9))


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_deleted_shard_is_written_again_unless_the_source_has_other_names(
    shuffle, tmp_path, capsys
):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    FORMATS["images_beside"](images, PAIRS)
    how: dict[str, Any] = {"source": str(images), "samples_per_shard": 6, "shuffle": shuffle}
    config = PrepareConfig(**how, destination=out)
    report, before = prepare(config), digests(out)
    lost = [f"pairs-0000{number}-of-00004.array_record" for number in (2, 3)]
    (out / lost[0]).unlink()
    (out / lost[1]).with_suffix(".json").unlink()
    assert prepare(config) == report
    assert digests(out) == before
    message = f"{', '.join(lost)} of {out} are missing or damaged; writing them again"
    assert message in capsys.readouterr().err
    (images / "00.png").rename(images / "z.png")
    with pytest.raises(ValueError, match="other settings: digest "):
        prepare(config)


@pytest.mark.parametrize("kind", ["array_record", "tar"])
def test_a_damaged_shard_is_written_again(kind, source, tmp_path, capsys):
    """Else a copy that was cut would lack pairs, and its report count them."""
    config = PrepareConfig(
        source=source, destination=tmp_path / "out", samples_per_shard=6, shards=kind
    )
    report = prepare(config)
    before = {path: path.read_bytes() for path in (tmp_path / "out").glob("pairs-*")}
    shard = tmp_path / f"out/pairs-00001-of-00004.{kind}"
    content = before[shard]
    for path, damaged in (
        (shard, content[: len(content) // 2]),
        (shard, content + bytes(1 << 16)),
        (shard.with_suffix(".json"), b'{"counts": '),
    ):
        path.write_bytes(damaged)
        assert prepare(config) == report
        assert {path: path.read_bytes() for path in before} == before
        assert f"{shard.name} of {tmp_path}/out are missing or damaged" in capsys.readouterr().err
    older = json.loads(shard.with_suffix(".json").read_text())
    del older["bytes"]  # of an older version, which did not store it
    shard.with_suffix(".json").write_text(json.dumps(older))
    assert prepare(config) == report
    assert not capsys.readouterr().err


def test_large_images_are_made_smaller_and_others_encoded_anew(source, tmp_path):
    prepare(PrepareConfig(source=source, destination=tmp_path / "a", resize=12))
    images = [Image.open(io.BytesIO(image)) for image, _ in read_all(tmp_path / "a")]
    assert (images[0].size, images[0].format) == ((10, 20), "PNG")
    assert (images[5].size, images[5].format) == ((12, 16), "JPEG")
    config = PrepareConfig(source=source, destination=tmp_path / "b", resize=12, encode="webp")
    prepare(config)
    images = [Image.open(io.BytesIO(image)) for image, _ in read_all(tmp_path / "b")]
    assert {image.format for image in images} == {"WEBP"}
    assert images[5].size == (12, 16)
    assert images[5].convert("RGB").getpixel((3, 3)) == pytest.approx((0, 128, 0), abs=3)


def test_parts_write_every_pair_verbatim_and_their_report_adds_up(source, tmp_path):
    """Over parts, and when nothing is left to write."""
    folder = tmp_path / "out"
    how = {"source": source, "destination": folder, "samples_per_shard": 4, "min_side": 14}
    first = prepare(PrepareConfig(**how, worker="2/2"))
    assert first["shards"] == {"written": 2, "of": 5}
    prepare(PrepareConfig(**how, worker="1/2"))
    assert read_all(folder) == [(image, text) for _, image, text in PAIRS[4:]]
    assert len(list(folder.glob("*.array_record"))) == 5  # of the first nothing is kept
    assert not list(folder.glob(".*.partial.*"))
    (folder / "_SUCCESS").unlink()
    report = prepare(PrepareConfig(**how))
    assert report == json.loads((folder / "report.json").read_text())
    assert report["shards"] == {"written": 5, "of": 5}
    assert report["counts"] == {"kept": 16, "image side": 4}
    assert report["examples"]["image side"].endswith("00000.tar:00: image side: 10 pixels")
    assert all(sum(counts) == 16 for counts in report["histograms"].values())
    assert report["quantiles"]["shorter side, pixels"]["50%"] == pytest.approx(18, rel=0.12)
    assert all(6 <= value <= 7 for value in report["quantiles"]["caption, characters"].values())
    for name, damaged in (("report.json", "{}"), ("report.json", "["), ("prepare.json", "{")):
        content = (folder / name).read_text()
        (folder / name).write_text(damaged)
        with pytest.raises(InputError, match=rf"{name} is damaged: .* Restore a copy"):
            prepare(PrepareConfig(**how))
        (folder / name).write_text(content)
    (folder / "report.json").unlink()  # as the message says
    assert prepare(PrepareConfig(**how)) == report
    assert "16  kept" in describe(report)
    assert "5 of 5 shards are written" in describe(report)


def test_nothing_is_kept(source, tmp_path, capsys):
    assert main(["prepare", source, str(tmp_path / "none"), "--min-side", "99", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["counts"] == {"image side": 20}
    assert "no pair was kept; the counts say why" in printed.err


def test_inspect_shows_the_first_samples(source, capsys):
    assert main(["prepare", source, "--inspect", "--min-side", "11", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["samples"] == 20
    assert result["counts"] == {"kept": 19, "image side": 1}
    assert result["first"][0]["dropped"] == "image side: 10 pixels"
    assert result["first"][1]["captions"] == ["text 1"]
    assert result["first"][1]["size"] == [11, 20]
    assert main(["prepare", source, "--inspect"]) == 0
    assert "20 samples\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"worker": "3/2"}, "worker='3/2' must be i/n"),
        ({"samples_per_shard": 0}, "samples_per_shard=0"),
    ],
)
def test_wrong_config(wrong, message):
    with pytest.raises(ValueError, match=message):
        PrepareConfig(source="x.tar", **wrong)
    for path, says in (("*.zip", "is not a data source"), ("x.zip", "x.zip does not exist")):
        with pytest.raises(ValueError, match=says):
            guess_source(PathConfig(path=path))


def test_what_has_no_index(capsys):
    """What an index is good for is tested in tests/contract."""
    assert main(["prepare", "pairs.csv", "--index"]) == 2
    assert "only tars" in capsys.readouterr().err
