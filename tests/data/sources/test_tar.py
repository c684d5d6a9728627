"""Tars: what an index holds, what is refused and why, and how fast it goes."""

import itertools
import json
import os
import tarfile
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.sources import SampleError, files, tar
from clip_jax.data.sources.tar import TarConfig, TarSource, index_shard
from clip_jax.data.tokenizer import Tokenizer

from ..formats import write_tar

RNG = np.random.default_rng(0)


def pair(name, image=b"image", text=b"text"):
    return [(f"{name}.jpg", image), (f"{name}.txt", text)]


def open_tar(path, **fields):
    return TarSource(TarConfig(path=str(path), **fields))


def reason(source, index):
    with pytest.raises(SampleError) as raised:
        source.load(index, RNG)
    return str(raised.value)


def test_members_become_pairs_in_order(tmp_path):
    write_tar(tmp_path / "a.tar", pair("1", b"x", b"eins") + pair("d/2", b"y" * 999, b"zwei"))
    write_tar(tmp_path / "b.tar", [*pair("1", b"z", b"drei"), ("1.npy", b"not ours")])
    source = open_tar(tmp_path / "*.tar")
    assert [source.load(i, RNG) for i in range(3)] == [
        (b"x", "eins"),
        (b"y" * 999, "zwei"),
        (b"z", "drei"),
    ]
    assert source.key(0) == f"{tmp_path}/a.tar:1"
    assert source.key(1) == f"{tmp_path}/a.tar:d/2"
    assert source.key(2) == f"{tmp_path}/b.tar:1"
    assert len(source) == 3


@pytest.mark.parametrize("extension", ["jpg", "JPEG", "png", "webp", "avif"])
def test_image_extensions(extension, tmp_path):
    write_tar(tmp_path / "a.tar", [("k.txt", b"text"), (f"k.{extension}", b"image")])
    assert open_tar(tmp_path / "a.tar").load(0, RNG) == (b"image", "text")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(format, tmp_path):
    names = ["n" * 90, "folder/" * 15 + "x", "ü" * 40]
    if format != tarfile.USTAR_FORMAT:
        names.append("m" * 300)
    members = [member for name in names for member in pair(name, name.encode())]
    write_tar(tmp_path / "a.tar", members, format=format)
    source = open_tar(tmp_path / "a.tar")
    assert [source.load(i, RNG)[0].decode() for i in range(len(source))] == names
    assert [source.key(i).split(":")[1] for i in range(len(source))] == names


def test_captions_from_json_and_cls(tmp_path):
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    members = [("1.jpg", b"x"), ("1.json", json.dumps({"alt": ["a", "b"]}).encode())]
    members += [("1.cls", b"1\n"), ("2.jpg", b"x"), ("2.json", b"[1]"), ("2.cls", b"7")]
    write_tar(tmp_path / "a.tar", members)
    source = open_tar(tmp_path / "a.tar", caption="json", caption_key="alt")
    drawn = {source.load(0, np.random.default_rng(i))[1] for i in range(20)}
    assert drawn == {"a", "b"}
    assert reason(source, 1) == ".json is a list, not an object"
    assert open_tar(tmp_path / "a.tar", caption="cls").load(0, RNG)[1] == "1"
    named = open_tar(tmp_path / "a.tar", caption="cls", class_names=str(tmp_path / "names.txt"))
    assert named.load(0, RNG)[1] == "dog"
    assert reason(named, 1) == ".cls is '7', not a number below 2"


def test_missing_members_and_bad_text_are_samples_with_a_reason(tmp_path):
    members = [("1.jpg", b"x"), ("2.txt", b"x"), ("3.jpg", b"x"), ("3.txt", b"\xff")]
    write_tar(tmp_path / "a.tar", members)
    source = open_tar(tmp_path / "a.tar")
    assert len(source) == 3
    assert reason(source, 0) == "no .txt member"
    assert reason(source, 1).startswith("no .jpg/.jpeg")
    assert reason(source, 2).startswith("caption is not UTF-8")


def test_gzip_is_refused_with_a_reason(tmp_path):
    write_tar(tmp_path / "packed.tar", [])
    os.remove(tmp_path / "packed.tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz"):
        pass
    with pytest.raises(ValueError, match=r"packed\.tar .*gzip, which has no random access"):
        open_tar(tmp_path / "packed.tar")


def test_missing_and_truncated_shards_are_named_or_skipped(tmp_path, caplog):
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", pair("a", b"x" * 3000) + pair("b"))
    (tmp_path / "1.tar").unlink()
    pattern = tmp_path / "{0..3}.tar"
    with pytest.raises(ValueError, match=r"1 shards of .* are missing: .*1\.tar.*bad_shards"):
        open_tar(pattern)
    whole = (tmp_path / "2.tar").read_bytes()
    for size in (100, 512, 1000, 4096, 4608):
        (tmp_path / "2.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"2\.tar \(truncated"):
            open_tar(tmp_path / "{0,2,3}.tar")
    assert len(open_tar(pattern, bad_shards="skip")) == 4
    assert "1.tar; skipped" in caplog.text
    assert "2.tar (truncated" in caplog.text
    (tmp_path / "2.tar").write_bytes(whole[:600] + b"\xff" * 3000 + whole[3600:])
    with pytest.raises(ValueError, match=r"2\.tar \(damaged: no tar header at byte 3584"):
        open_tar(tmp_path / "2.tar")
    with pytest.raises(ValueError, match="nothing matches"):
        open_tar(tmp_path / "*.zip")


def test_img2dataset_counts_are_checked(tmp_path):
    write_tar(tmp_path / "0.tar", pair("a") + pair("b"))
    pq.write_table(pa.table({"status": ["success"] * 3 + ["failed"]}), tmp_path / "0.parquet")
    with pytest.raises(ValueError, match="has 2 samples, img2dataset counted 3"):
        open_tar(tmp_path / "0.tar")
    (tmp_path / "0_stats.json").write_text('{"successes": 2}')
    assert len(open_tar(tmp_path / "0.tar")) == 2


def test_the_index_is_built_once_and_follows_changes(tmp_path, monkeypatch):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", pair("a", b"old"))
    read = []
    index = index_shard
    monkeypatch.setattr(tar, "index_shard", lambda shard: read.append(shard) or index(shard))
    kept = tmp_path / "elsewhere"
    for _ in range(2):
        assert len(open_tar(tmp_path / "{0..2}.tar", index=str(kept))) == 3
    assert len(read) == 3
    write_tar(tmp_path / "1.tar", pair("a", b"new") + pair("b"))
    source = open_tar(tmp_path / "{0..2}.tar", index=str(kept))
    assert (len(source), source.load(1, RNG)[0]) == (4, b"new")
    assert read[3:] == [f"{tmp_path}/1.tar"]
    (file,) = kept.iterdir()
    file.write_bytes(file.read_bytes()[:-100])  # not whole: built again
    assert len(open_tar(tmp_path / "{0..2}.tar", index=str(kept))) == 4


def test_shards_in_a_bucket(tmp_path):
    import fsspec

    memory = fsspec.filesystem("memory")
    write_tar(tmp_path / "a.tar", pair("a", b"x" * 2000, b"one") + pair("b", b"y", b"two"))
    memory.pipe("/bucket/0.tar", (tmp_path / "a.tar").read_bytes())
    for _ in range(2):  # the second time with its index
        source = open_tar("memory://bucket/*.tar")
        assert source.load(0, RNG) == (b"x" * 2000, "one")
        assert source.load(1, RNG) == (b"y", "two")
    assert len(memory.glob("/bucket/*.arrow")) == 1


def test_a_pair_in_a_bucket_costs_one_request(monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/far/a", bytes(range(256)) * 1000)
    asked = []
    read = type(memory).cat_file
    monkeypatch.setattr(
        type(memory), "cat_file", lambda *args, **how: asked.append(how) or read(*args, **how)
    )
    assert files.read_ranges("memory://far/a", [(1024, 2), (4, 3)]) == [b"\0\1", b"\4\5\6"]
    assert len(asked) == 1
    assert files.read_ranges("memory://far/a", [(0, 2), (255_999, 9)]) == [b"\0\1", b"\xff"]
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a{08..11}.tar", ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("plain", ["plain"]),
    ],
)
def test_braces(pattern, paths):
    assert files.expand(pattern) == paths


def test_twenty_thousand_samples_a_second_are_indexed(tmp_path):
    members = [m for i in range(3000) for m in pair(f"{i:09d}", b"x" * 2000)]
    write_tar(tmp_path / "a.tar", members)
    start = time.process_time()  # of this process: other work on the machine does not count
    assert index_shard(str(tmp_path / "a.tar")).num_rows == 3000
    rate = 3000 / (time.process_time() - start)
    print(f"{rate:,.0f} samples/s indexed")
    assert rate > 20_000


def test_a_million_samples_start_within_five_seconds(tmp_path, write_pairs):
    """A hundred names of one shard, and an index that says so."""
    write_pairs(tmp_path, 4)
    image = (tmp_path / "images/0001.jpg").read_bytes()
    write_tar(tmp_path / "0.tar", [m for i in range(20) for m in pair(f"{i}", image)])
    shards = [f"{tmp_path}/{i}.tar" for i in range(100)]
    for shard in shards[1:]:
        os.link(shards[0], shard)
    config = TarConfig(path=str(tmp_path / "{0..99}.tar"))
    rows = pa.Table.from_batches([index_shard(shards[0])] * 500).combine_chunks().to_batches()[0]
    size = files.stat(shards[0])
    path = tar.index_path(config, files.expand(config.path))
    tar.write_index(path, [(shard, size, rows) for shard in shards])
    start, wall = time.process_time(), time.perf_counter()
    tracemalloc.start()
    pipeline = build(
        DataConfig(source=config),
        tokenizer=Tokenizer(1024),
        image_size=16,
        context_length=16,
        batch_size=8,
    )
    assert pipeline.num_samples == 1_000_000
    batches = pipeline.batches(0)
    (batch,) = itertools.islice(batches, 1)
    batches.close()
    assert batch.skipped == []
    seconds, wall = time.process_time() - start, time.perf_counter() - wall
    print(f"first batch after {seconds:.2f} s of CPU, {wall:.2f} s")
    assert seconds < 5
    assert tracemalloc.get_traced_memory()[1] < 50e6  # the index stays on disk
    tracemalloc.stop()
