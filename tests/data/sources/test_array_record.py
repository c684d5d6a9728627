"""ArrayRecord: our reader of ranges against array_record's own; damage; buckets."""

import io
import itertools
import random

import numpy as np
import pytest
from PIL import Image

from clip_jax import bucket as client
from clip_jax import files
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.sources import array_record
from clip_jax.data.sources.array_record import (
    ArrayRecordConfig,
    ArrayRecordSource,
    encode_example,
)
from clip_jax.data.sources.array_record_file import ArrayRecordFile
from clip_jax.refused import Refused

OPTIONS = (
    "group_size:1", "group_size:1,brotli:3", "group_size:3,zstd:1", "group_size:2,uncompressed",
    "group_size:7,snappy", "group_size:2,pad_to_block_boundary:true",
)  # fmt: skip


def write(path, options, records):
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()


def expected(path):
    """All records, by array_record's own reader."""
    from array_record.python.array_record_module import ArrayRecordReader

    return list(ArrayRecordReader(str(path), "").read_all())


def draw(count, largest=9_000):
    """Records of all sizes, from no byte on; half of each compresses."""
    rng = random.Random(count)
    sizes = [0, 1, 127, 128, 65_536, 200_000, *(rng.randrange(largest) for _ in range(count))]
    return [rng.randbytes(size // 2) + bytes(size - size // 2) for size in sizes[:count]]


def png(number):
    """About 16 kB, another for each number."""
    file = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (72, 72, 3), np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def pairs(count):
    return [
        encode_example({"image": [bytes([i]) * 20_000], "caption": [f"caption {i}".encode()]})
        for i in range(count)
    ]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [1, 2, 60])
def test_records_are_those_that_array_record_reads(options, count, tmp_path):
    records = draw(count)
    write(tmp_path / "x", options, records)
    found = ArrayRecordFile(str(tmp_path / "x"))
    assert len(found) == count
    assert expected(tmp_path / "x") == records
    for first in range(0, count, 7):
        for last in range(first + 1, count + 1, 5):
            assert found.read(first, last) == records[first:last]


@pytest.mark.long
def test_an_index_longer_than_what_is_read_at_first(tmp_path):
    records = [bytes([i % 251]) for i in range(60_000)]
    write(tmp_path / "x", "group_size:1,uncompressed", records)
    found = ArrayRecordFile(str(tmp_path / "x"))
    assert (tmp_path / "x").stat().st_size - found.end > 2 << 17
    assert found.read(0, 60_000) == records
    assert found.read(59_999, 60_000) == records[-1:]


def test_damage_is_a_value_error_and_nothing_else(tmp_path):
    records = draw(20)
    write(tmp_path / "whole", "group_size:3", records)
    whole = (tmp_path / "whole").read_bytes()
    end, last = ArrayRecordFile(str(tmp_path / "whole")).end, len(whole) - (1 << 16)
    rng = random.Random(0)
    refused = 0
    for i in range(300):
        damaged = bytearray(whole)
        for _ in range(1 + i % 3):
            low, high = ((end, end + 150), (last, last + 100), (0, end))[i % 3]
            damaged[rng.randrange(low, high)] = rng.randrange(256)
        (tmp_path / f"{i}").write_bytes(damaged[: rng.choice((len(whole), last, last + 70_000))])
        try:
            found = ArrayRecordFile(str(tmp_path / f"{i}"))
            found.read(0, len(found))
        except (ValueError, OSError):
            refused += 1
    assert 150 < refused < 300


def test_stretches_are_whole_groups_of_some_mib(tmp_path):
    records = [random.Random(i).randbytes(100_000) for i in range(100)]
    for number, group in enumerate((1, 7)):
        write(tmp_path / f"{number}.array_record", f"group_size:{group}", records)
    source = ArrayRecordSource(ArrayRecordConfig(path=str(tmp_path / "*.array_record")))
    assert source.stretches().tolist() == [42, 42, 16, 42, 42, 16]
    assert source.size(0, 200) == pytest.approx(200 * 100_000, rel=0.01)
    assert source.size(0, 42) == pytest.approx(42 * 100_000, rel=0.01)
    assert [len(records) for records in (source.fetch(0, 42), source.fetch(184, 200))] == [42, 16]


@pytest.mark.parametrize("options", ["group_size:1", "group_size:4"])
def test_a_bucket_s_records_are_the_disk_s_and_a_stretch_is_one_request(options, bucket, tmp_path):
    records = pairs(30)
    for number in range(2):
        write(tmp_path / f"{number}.array_record", options, records[number * 15 :][:15])
        content = (tmp_path / f"{number}.array_record").read_bytes()
        files.write_whole(f"{bucket.url}/{number}.array_record", content)
    disk, remote = (
        ArrayRecordSource(ArrayRecordConfig(path=f"{place}/*.array_record"))
        for place in (tmp_path, bucket.url)
    )
    assert len(remote) == len(disk) == 30
    assert remote.stretches().tolist() == disk.stretches().tolist() == [15, 15]
    remote.fetch(0, 1), remote.fetch(15, 16)  # the indices
    bucket.server.requests()
    rng = np.random.default_rng(0)
    found = [record.load(rng) for first in (0, 15) for record in remote.fetch(first, first + 15)]
    assert len(bucket.server.requests()) == 2
    assert found == [disk.load(i, rng) for i in range(30)]
    assert found == [remote.load(i, rng) for i in range(30)]
    assert remote.captions(17) == ["caption 17"]


def test_a_run_reads_stretches_from_a_bucket_and_any_order_from_a_disk(gs, tmp_path):
    write(tmp_path / "x.array_record", "group_size:1", pairs(30))
    files.write_whole(f"{gs.url}/x.array_record", (tmp_path / "x.array_record").read_bytes())

    def opened(folder, order):
        config = ArrayRecordConfig(path=f"{folder}/*.array_record")
        return build(
            DataConfig(source=config, order=order), tokenizer=lambda texts, *_: texts,
            image_size=16, context_length=8, batch_size=4,
        )  # fmt: skip

    assert opened(gs.url, "auto").order == "stretches"
    assert opened(tmp_path, "auto").order == "global"
    assert opened(tmp_path, "stretches").fingerprint() != opened(tmp_path, "global").fingerprint()


def test_faults_on_the_way_lose_and_double_nothing(bucket, tmp_path, monkeypatch):
    """5% of the answers are 503 or 429, 1% cut short, 1% never come."""
    monkeypatch.setattr(array_record, "_STRETCH", 60_000)  # three records: many requests
    monkeypatch.setattr(client, "_LATE", (0.2, 4.0))  # nobody waits a second here
    count, steps = 300, 60
    images = [png(i) for i in range(count)]
    write(
        tmp_path / "x.array_record", "group_size:1,uncompressed",
        [encode_example({"image": [x], "caption": [b"x"]}) for x in images],
    )  # fmt: skip
    url = f"{bucket.url}/x.array_record"
    files.write_whole(url, (tmp_path / "x.array_record").read_bytes())

    def read(path):
        pipeline = build(
            DataConfig(source=ArrayRecordConfig(path=str(path)), order="stretches", window=8),
            tokenizer=lambda texts, *_: np.zeros((len(texts), 8), np.int32),
            image_size=16, context_length=8, batch_size=10,
        )  # fmt: skip
        batches = pipeline.batches(0)
        taken = list(itertools.islice(batches, steps))
        batches.close()
        return taken

    expected = read(tmp_path / "x.array_record")
    faults = {"503": 0.025, "429": 0.025, "cut": 0.01, "hang": 0.01}
    bucket.server.behave(faults=faults, only="GET", seed=3)
    found = read(url)
    asked = bucket.server.requests()
    assert sum(one["status"] in (429, 503) for one in asked) > 3
    assert any(one["status"] == 0 for one in asked)  # no answer
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        assert not b.skipped
    keys = [key for batch in found for key in batch.keys]
    assert {keys.count(key) for key in set(keys)} == {steps * 10 // count}
    assert len(set(keys)) == count


def test_transposed_records_are_read_on_a_disk_only(gs, tmp_path):
    write(tmp_path / "x.array_record", "group_size:2,transpose:true", pairs(5))
    url = f"{gs.url}/x.array_record"
    files.write_whole(url, (tmp_path / "x.array_record").read_bytes())
    source = ArrayRecordSource(ArrayRecordConfig(path=str(tmp_path / "x.array_record")))
    assert source.captions(4) == ["caption 4"]
    with pytest.raises(Refused, match=r"transposed, which is read on a disk only: clip-jax prep"):
        ArrayRecordSource(ArrayRecordConfig(path=url))
