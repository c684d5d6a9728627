"""ArrayRecord: our reader of ranges against array_record's own; damage."""

import random
from unittest import mock

import pytest

from clip_jax.data.sources import array_record, array_record_file
from clip_jax.data.sources.array_record import (
    ArrayRecordConfig,
    ArrayRecordSource,
    encode_example,
)
from clip_jax.data.sources.array_record_file import ArrayRecordFile
from tests.data.conftest import write_records

OPTIONS = (
    "group_size:1",
    "group_size:1,brotli:3",
    "group_size:3,zstd:1",
    "group_size:2,uncompressed",
    "group_size:7,snappy",
    "group_size:2,pad_to_block_boundary:true",
)


def draw(count, largest=9_000):
    """Records of all sizes, from no byte on; half of each compresses."""
    rng = random.Random(count)
    sizes = [0, 1, 127, 128, 65_536, 200_000, *(rng.randrange(largest) for _ in range(count))]
    return [rng.randbytes(size // 2) + bytes(size - size // 2) for size in sizes[:count]]


@pytest.mark.parametrize("options", OPTIONS)
def test_records_are_those_that_array_record_reads(options, tmp_path):
    from array_record.python.array_record_module import ArrayRecordReader

    for count in (1, 2, 40):
        path, records = tmp_path / f"{count}", draw(count)
        write_records(path, options, records)
        found = ArrayRecordFile(str(path))
        assert len(found) == count
        assert [*ArrayRecordReader(str(path), "").read_all()] == records
        for first in range(0, count, 7):
            for last in range(first + 1, count + 1, 5):
                assert found.read(first, last) == records[first:last]


def test_an_index_longer_than_what_is_read_at_first(tmp_path):
    records = [bytes([i % 251]) for i in range(600)]
    write_records(tmp_path / "x", "group_size:1,uncompressed", records)
    with mock.patch.object(array_record_file, "_TAIL", 1 << 10):
        found = ArrayRecordFile(str(tmp_path / "x"))
    assert (tmp_path / "x").stat().st_size - (1 << 16) - found.end > 1 << 10
    assert found.read(0, 600) == records
    assert found.read(599, 600) == records[-1:]


def test_damage_is_a_value_error_and_nothing_else(tmp_path):
    records = draw(20)
    write_records(tmp_path / "whole", "group_size:3", records)
    whole = (tmp_path / "whole").read_bytes()
    end, last = ArrayRecordFile(str(tmp_path / "whole")).end, len(whole) - (1 << 16)
    rng = random.Random(0)
    refused = 0
    for i in range(90):
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
    assert 40 < refused < 90


@mock.patch.object(array_record, "_BLOCK_BYTES", 42_000)
def test_blocks_are_whole_groups_of_about_a_size(tmp_path):
    records = [random.Random(i).randbytes(1_000) for i in range(100)]
    for number, group in enumerate((1, 7)):
        write_records(tmp_path / f"{number}.array_record", f"group_size:{group}", records)
    source = ArrayRecordSource(ArrayRecordConfig(path=str(tmp_path / "*.array_record")))
    assert source.blocks().tolist() == [39, 39, 22, 42, 42, 16]
    assert source.size(0, 200) == pytest.approx(200 * 1_000, rel=0.05)
    assert source.size(0, 39) == pytest.approx(42_000, rel=0.02)
    assert [len(records) for records in (source.fetch(0, 39), source.fetch(184, 200))] == [39, 16]


def test_transposed_records_are_read_on_a_disk_only(tmp_path):
    record = encode_example({"image": [b"image"], "caption": [b"caption"]})
    write_records(tmp_path / "x.array_record", "group_size:2,transpose:true", [record] * 5)
    config = ArrayRecordConfig(path=str(tmp_path / "x.array_record"))
    assert ArrayRecordSource(config).record(4).captions() == ["caption"]
    file = ArrayRecordFile(config.path)
    with (
        mock.patch.object(array_record.files, "is_remote", autospec=True, return_value=True),
        mock.patch.object(array_record.files, "expand", autospec=True, return_value=[config.path]),
        mock.patch.object(array_record, "ArrayRecordFile", autospec=True, return_value=file),
        pytest.raises(ValueError, match=r"transposed, which is read from a disk only: clip-jax"),
    ):
        ArrayRecordSource(config)
