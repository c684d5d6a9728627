"""Tars: what an index holds, what is refused and why, and how fast it goes."""

import functools
import itertools
import json
import os
import subprocess
import sys
import tarfile
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from clip_jax import files
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.sources import SampleError, tar_index
from clip_jax.data.sources.tar import TarConfig, TarSource
from clip_jax.data.sources.tar_index import Shard, index_shard
from clip_jax.data.tokenizers.clip import ClipTokenizer
from clip_jax.refused import Refused
from tests.conftest import ROOT
from tests.data.conftest import write_tar

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


def test_names_with_dots_of_their_own_are_counted(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [*pair("1"), *pair("a.b"), ("1.seg.png", b"another stream")])
    write_tar(tmp_path / "b.tar", [*pair("2"), ("2.npy", b""), ("d.ir/3.jpg", b"x")])
    for _ in range(2):  # from the tars, and from the index
        caplog.clear()
        assert len(open_tar(tmp_path / "*.tar")) == 3
        assert "3 members of 1 shards, such as a.b.jpg, are ignored" in caplog.text


def test_sizes_of_thousands_of_digits_are_damage(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as file:
        member = tarfile.TarInfo("1.jpg")
        member.pax_headers = {"size": "9" * 5000}
        file.addfile(member)
    with pytest.raises(Refused, match="whose size is no number"):
        open_tar(tmp_path / "a.tar")


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


@pytest.fixture
def indexed(monkeypatch):
    """Shards whose headers are read, in turn."""
    read = []
    index = tar_index.index_shard
    monkeypatch.setattr(
        tar_index, "index_shard", lambda shard, size: read.append(shard) or index(shard, size)
    )
    return read


def test_the_index_is_built_once_and_follows_changes(tmp_path, indexed):
    for i in range(3):
        write_tar(tmp_path / f"{i}.tar", pair("a", b"old"))
    kept = tmp_path / "elsewhere"
    for _ in range(2):
        assert len(open_tar(tmp_path / "{0..2}.tar", index=str(kept))) == 3
    assert len(indexed) == 3
    write_tar(tmp_path / "1.tar", pair("a", b"new") + pair("b"))
    source = open_tar(tmp_path / "{0..2}.tar", index=str(kept))
    assert (len(source), source.load(1, RNG)[0]) == (4, b"new")
    assert indexed[3:] == [f"{tmp_path}/1.tar"]
    (summary,) = kept.glob("*.arrow")
    rows = sorted(kept.glob("*/*.arrow"))
    assert len(rows) == 3
    for file in (summary, rows[2]):
        file.write_bytes(file.read_bytes()[:-100])  # not whole: built again
    assert len(open_tar(tmp_path / "{0..2}.tar", index=str(kept))) == 4
    assert indexed[4:] == [f"{tmp_path}/2.tar"]


def test_a_shard_that_was_bad_is_read_again(tmp_path, indexed):
    write_tar(tmp_path / "0.tar", pair("a"))
    write_tar(tmp_path / "1.tar", pair("a"))
    whole = (tmp_path / "1.tar").read_bytes()
    (tmp_path / "1.tar").write_bytes(whole[:700])
    for _ in range(2):
        with pytest.raises(Refused, match=r"1\.tar \(truncated"):
            open_tar(tmp_path / "*.tar")
    (tmp_path / "1.tar").write_bytes(whole)
    assert len(open_tar(tmp_path / "*.tar")) == 2
    assert indexed.count(f"{tmp_path}/0.tar") == 1


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("caption", ["txt", "json"])
def test_a_stretch_holds_what_its_samples_are(format, caption, tmp_path, monkeypatch):
    """Read in one go, whole or in part, samples are as those read one by one, faults included."""
    monkeypatch.setattr(tar_index, "_STRETCH", 20_000)
    long = "m" * 120 if format != tarfile.USTAR_FORMAT else "m"
    for shard in range(2):
        members = [("readme.md", b"x" * 700)]
        for i in range(20):
            fields = json.dumps({"caption": [f"{shard}", f"{i}"]}).encode()
            members += [(f"{long}{i}.npy", b"z"), (f"{long}{i}.json", fields)]
            members += pair(f"{long}{i}", bytes([i]) * (1 + 300 * i), f"{shard} {i}".encode())
            members += [(f"only-{i}.jpg", b"y")] * (i % 7 == 0)
        write_tar(tmp_path / f"{shard}.tar", members, format=format)
    source = open_tar(tmp_path / "*.tar", caption=caption)
    counts = source.stretches()
    assert counts.sum() == len(source)
    assert len(counts) >= 8
    ends = np.cumsum(counts)
    spans = [(int(end - count), int(end)) for end, count in zip(ends, counts, strict=True)]
    spans += [(first + 1, last) for first, last in spans if last - first > 1]
    for first, last in spans:
        for index, record in zip(range(first, last), source.fetch(first, last), strict=True):
            assert record.key == source.key(index)
            rngs = [np.random.default_rng(index) for _ in range(2)]
            try:
                wanted = source.load(index, rngs[0])
            except SampleError as error:
                wanted = error
            try:
                found = record.load(rngs[1])
            except SampleError as error:
                found = error
            assert str(wanted) == str(found)
    assert source.size(0, len(source)) == sum(source.size(*span) for span in spans[: len(counts)])


def test_a_shard_that_changed_is_bad_samples(tmp_path):
    write_tar(tmp_path / "0.tar", [m for i in range(4) for m in pair(f"{i}", b"x" * 999)])
    source = open_tar(tmp_path / "0.tar")
    write_tar(
        tmp_path / "0.tar", [m for i in range(4) for m in pair(f"{i}")] + pair("5", b"y" * 9999)
    )
    with pytest.raises(SampleError, match="shard changed: truncated"):
        source.fetch(0, 4)
    (tmp_path / "0.tar").write_bytes(b"x" * 20_000)
    with pytest.raises(SampleError, match="no tar header"):
        source.fetch(0, 4)
    (tmp_path / "0.tar").unlink()
    with pytest.raises(SampleError, match="No such file"):
        source.fetch(0, 4)


def test_processes_share_the_building_of_an_index(tmp_path, gs, indexed, monkeypatch):
    """Each shard's headers are read once in all, by small ranges; a killed one loses its own."""
    monkeypatch.setattr(tar_index, "_LOOK", 0.05)
    for i in range(9):
        write_tar(tmp_path / "a.tar", [m for n in range(3) for m in pair(f"{n}", b"x" * 50_000)])
        files.write_whole(f"{gs.url}/{i}.tar", (tmp_path / "a.tar").read_bytes())
    pattern = f"{gs.url}/{{0..8}}.tar"
    assert tar_index.open_index(pattern, "", "error", (1, 4), wait=False) is None
    assert len(indexed) == 2
    gs.server.requests()
    with ThreadPoolExecutor() as threads:
        parts = [(number, 4) for number in range(4)]
        found = list(threads.map(functools.partial(TarSource, TarConfig(path=pattern)), parts))
    assert [len(source) for source in found] == [27] * 4
    assert sorted(indexed) == sorted(f"{gs.url}/{i}.tar" for i in range(9))
    asked = [one for one in gs.server.requests() if ".tar" in one["path"] and one["bytes"]]
    assert sum(one["bytes"] for one in asked) < 9 * 50_000
    gs.server.requests()
    assert len(TarSource(TarConfig(path=pattern), (2, 4))) == 27
    assert len(gs.server.requests()) <= 3  # a listing, and the file of all shards
    assert len(indexed) == 9


@pytest.mark.slow
def test_the_index_of_a_large_set_opens_soon(tmp_path):
    """41,455 shards of 10,000 samples: counts and stretches alone."""
    shards = [
        Shard(f"gs://b/{i:05d}.tar", (10**9, 0.0), np.arange(51) * 20_000_000, np.full(50, 200))
        for i in range(41_455)
    ]
    path = str(tmp_path / "all.arrow")
    tar_index.write_summary(path, shards)
    del shards
    start = time.process_time()
    tracemalloc.start()
    index = tar_index.TarIndex([(one, "") for one in tar_index.read_summary(path)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"{time.process_time() - start:.1f} s of CPU, {peak / 1e6:.0f} MB")
    assert len(index.places) == 414_550_000
    assert index.stretch(414_549_999)[0] == 41_454
    assert time.process_time() - start < 30
    assert peak < 1e9


def test_shards_in_a_bucket(tmp_path, bucket):
    write_tar(tmp_path / "a.tar", pair("a", b"x" * 2000, b"one") + pair("b", b"y", b"two"))
    files.write_whole(f"{bucket.url}/a/0.tar", (tmp_path / "a.tar").read_bytes())
    for _ in range(2):  # the second time with its index
        source = open_tar(f"{bucket.url}/a/*.tar")
        assert source.load(0, RNG) == (b"x" * 2000, "one")
        assert source.load(1, RNG) == (b"y", "two")
    assert len(files.expand(f"{bucket.url}/a/*.arrow")) == 1


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


TIMED = """
import os, sys, time
from clip_jax.data.sources.tar_index import index_shard
path, seconds = sys.argv[1], []
for _ in range(3):  # the first pays for what Arrow loads when it is first used
    start = time.process_time()  # of this process: other work does not count
    assert index_shard(path, os.path.getsize(path)).num_rows == 3000
    seconds.append(time.process_time() - start)
print(3000 / min(seconds))
"""


def test_twenty_thousand_samples_a_second_are_indexed(tmp_path):
    """In a process of its own: here every call's types are checked, which takes nine tenths."""
    members = [m for i in range(3000) for m in pair(f"{i:09d}", b"x" * 2000)]
    write_tar(tmp_path / "a.tar", members)
    command = [sys.executable, "-c", TIMED, tmp_path / "a.tar"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    print(f"{float(done.stdout):,.0f} samples/s indexed")
    assert float(done.stdout) > 20_000


def test_a_million_samples_start_within_five_seconds(tmp_path, write_pairs):
    """A hundred names of one shard, and an index that says so."""
    write_pairs(tmp_path, 4)
    image = (tmp_path / "images/0001.jpg").read_bytes()
    write_tar(tmp_path / "0.tar", [m for i in range(20) for m in pair(f"{i}", image)])
    shards = [f"{tmp_path}/{i}.tar" for i in range(100)]
    for shard in shards[1:]:
        os.link(shards[0], shard)
    config = TarConfig(path=str(tmp_path / "{0..99}.tar"))
    size = files.stat(shards[0])
    rows = index_shard(shards[0], size[0])
    rows = pa.Table.from_batches([rows] * 500).combine_chunks().to_batches()[0]
    name = tar_index.index_name(files.expand(config.path))
    entries = [Shard(shard, size, range(0, 5_000_001, 50_000), [100] * 100) for shard in shards]
    (tmp_path / "rows").mkdir()
    for number, entry in enumerate(entries):
        tar_index.write_rows(f"{tmp_path}/rows/{number:05d}.arrow", entry, rows)
    (tmp_path / "rows").rename(name)
    tar_index.write_summary(f"{name}.arrow", entries)
    start, wall = time.process_time(), time.perf_counter()
    tracemalloc.start()
    pipeline = build(
        DataConfig(source=config),
        tokenizer=ClipTokenizer(1024),
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
