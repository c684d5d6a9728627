"""Batches in stretches of records that lie together: alike in any number of processes."""

import collections
import dataclasses
import functools
from unittest import mock

import numpy as np
import pytest

from clip_jax import files
from clip_jax.data import mixture, pieces
from clip_jax.data.digits import DigitsConfig, DigitsSource
from clip_jax.data.order import Lanes
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources import Record
from clip_jax.data.sources import any as any_source
from clip_jax.data.sources.tar import TarConfig
from tests.data.conftest import assert_same, digits, join, open_pipeline, take, write_tar


class Rows(DigitsSource):
    """Digits that say which of them lie together."""

    def stretches(self):
        return np.full(len(self) // 12, 12)

    def size(self, first, last):
        return last - first

    def fetch(self, first, last):
        return [Record(self.key(i), 1, functools.partial(self.load, i)) for i in range(first, last)]


@pytest.fixture
def rows(monkeypatch):
    """Digits are read in stretches, also as a mixture's member."""
    monkeypatch.setattr(any_source, "DigitsSource", Rows)
    return digits(samples=240, order="stretches", window=16)


def test_in_stretches_processes_and_threads_do_not_matter(rows):
    """Nor where a run is resumed, in another number of processes."""
    whole = take(rows, 50)
    for start, processes, threads in ((0, 2, 0), (23, 4, 3), (46, 1, 1)):
        config = dataclasses.replace(rows, threads=threads, read_ahead_mib=1)
        parts = [
            take(config, 4, start=start, process_index=p, process_count=processes)
            for p in range(processes)
        ]
        for batch, part in zip(whole[start:], zip(*parts, strict=True), strict=False):
            assert_same(batch, join(part))
    keys = [key for batch in whole for key in batch.keys]
    for epoch in range(2):
        assert len(set(keys[epoch * 240 : (epoch + 1) * 240])) == 240
    assert {batch.reading.bytes_used for batch in whole} == {12}


def test_in_stretches_a_mixture_is_alike_in_processes(rows):
    members = tuple(
        mixture.MemberConfig(source=DigitsConfig(samples=count), weight=weight)
        for count, weight in ((120, 3.0), (36, 1.0))
    )
    config = dataclasses.replace(rows, source=mixture.MixtureConfig(members=members))
    whole = take(config, 30)
    parts = [take(config, 9, start=21, process_index=p, process_count=3) for p in range(3)]
    for batch, part in zip(whole[21:], zip(*parts, strict=True), strict=True):
        assert_same(batch, join(part))
    keys = [key for batch in whole for key in batch.keys]
    assert 260 <= sum(key.startswith("0/") for key in keys) <= 280
    counts = collections.Counter(keys)
    assert {counts[key] for key in counts if key.startswith("0/")} <= {1, 2, 3, 4}


def test_in_stretches_workers_have_whole_lanes():
    lanes, load = Lanes(256), mock.create_autospec(pieces.Load, instance=True)
    for workers in (1, 2, 3, 5):
        made = pieces.LanePieces(load, len, len, lanes, workers, 0, 0)
        of_worker = [
            {i % made.number for i in range(3 * made.number) if i % workers == worker}
            for worker in range(workers)
        ]
        assert sum(map(len, of_worker)) == made.number >= lanes.count
        assert made.number % workers == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch_size": 12}, r"data\.order=stretches needs files with many records"),
        ({"batch_size": 72, "process_count": 8}, r"in 9 lanes, which 8 processes do not divide"),
    ],
)
def test_stretches_that_cannot_be(wrong, message, monkeypatch):
    if "process_count" in wrong:
        monkeypatch.setattr(any_source, "DigitsSource", Rows)
    with pytest.raises(ValueError, match=message):
        open_pipeline(digits(samples=240, order="stretches"), **wrong)


def test_a_budget_below_the_window(rows, monkeypatch):
    monkeypatch.setattr(Rows, "size", lambda self, first, last: (last - first) << 20)
    config = dataclasses.replace(rows, read_ahead_mib=100)
    with pytest.raises(ValueError, match=r"read_ahead_mib=100 is too little: .* holds 115 MiB"):
        open_pipeline(config)
    open_pipeline(config, process_count=2)


@pytest.fixture
def tars(write_pairs, tmp_path):
    """A hundred and twenty photographs in three tars, in stretches."""
    write_pairs(tmp_path, 30)
    images = sorted((tmp_path / "images").iterdir())
    for shard in range(3):
        members = []
        for number in range(shard * 40, shard * 40 + 40):
            name = f"{number:03d}{images[number % 30].suffix}"
            members += [(name, images[number % 30].read_bytes()), (f"{number:03d}.txt", b"a photo")]
        write_tar(tmp_path / f"{shard}.tar", members)
    return DataConfig(source=TarConfig(path=f"{tmp_path}/{{0..2}}.tar"), order="stretches")


@pytest.mark.long
def test_in_stretches_workers_do_not_matter(tars):
    """Two have nine lanes: one of them has nothing to do for the tenth piece."""
    wanted = take(tars, 4, batch_size=72)
    found = take(dataclasses.replace(tars, workers=2, threads=1), 3, start=1, batch_size=72)
    for first, second in zip(wanted[1:], found, strict=True):
        assert_same(first, second)


@pytest.mark.long
def test_faults_of_a_bucket_lose_and_double_nothing(gs, tars, tmp_path):
    """What a run reads from a faulty bucket is what it reads from disk."""
    for shard in tmp_path.glob("*.tar"):
        files.write_whole(f"{gs.url}/{shard.name}", shard.read_bytes())
    local = tars
    wanted = take(local, 20)
    assert len({key for batch in wanted[:10] for key in batch.keys}) == 120
    gs.server.behave(faults={"503": 0.1, "429": 0.1, "cut": 0.1, "reset": 0.1}, only="GET")
    far = dataclasses.replace(
        local, source=TarConfig(path=f"{gs.url}/{{0..2}}.tar"), order="auto", read_ahead_mib=8
    )
    for first, second in zip(wanted, take(far, 20), strict=True):
        np.testing.assert_array_equal(first.image, second.image)
        assert [key.rpartition("/")[2] for key in first.keys] == [
            key.rpartition("/")[2] for key in second.keys
        ]
        assert second.skipped == []
