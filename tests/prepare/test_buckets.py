"""The shuffle's files: any range of buckets as it was written."""

import numpy as np
import pytest

from clip_jax.prepare import buckets


def test_any_range_reads_as_written(tmp_path):
    parts = [b"one", b"", b"three" * 50, b"4"]
    buckets.write(tmp_path / "a", parts)
    for first in range(5):
        for last in range(first, 5):
            assert buckets.read(tmp_path / "a", first, last) == b"".join(parts[first:last])
    buckets.write(tmp_path / "b", [b"x"])
    assert list(buckets.read_all([tmp_path / "b", tmp_path / "a"], 0, 1)) == [b"x", b"one"]


def test_frames_come_out_as_they_went_in():
    pairs = [(2**64 - 1, 7, b"record"), (0, 2**63, b""), (5, 0, b"\0" * 99)]
    data = b"".join(buckets.frame(*pair) for pair in pairs)
    assert [(order, index, bytes(x)) for order, index, x in buckets.frames(data)] == pairs
    assert not list(buckets.frames(b""))


@pytest.mark.parametrize("count", [1, 2, 64])
def test_keys_fall_into_buckets_in_their_order(count):
    keys = np.sort(np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64, endpoint=False))
    numbers = buckets.number_of(keys, count).astype(int)
    assert (np.diff(numbers) >= 0).all()
    assert np.bincount(numbers, minlength=count).max() < 2.5 * 1000 / count
    assert numbers[-1] == count - 1


def test_powers_of_two():
    assert [buckets.power_of_two(x) for x in (0, 0.3, 1, 2, 2.1, 1000)] == [1, 1, 1, 2, 4, 1024]
