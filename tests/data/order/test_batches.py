"""Batches in the block order: the same for any number of processes and threads."""

import collections
import dataclasses
import functools
import itertools
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data import digits as digits_module
from clip_jax.data import pipeline
from clip_jax.data.batch_plan import BatchKind, BatchPlan, constant
from clip_jax.data.digits import DigitsConfig, DigitsSource
from clip_jax.data.order import batches
from clip_jax.data.order.blocks import Streams
from clip_jax.data.order.mixture import MemberConfig, MixtureConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources import Record
from clip_jax.data.sources.tar import TarConfig
from clip_jax.models.images import Square
from tests.conftest import types_unchecked
from tests.data.conftest import assert_same, digits, join, of_processes, open_pipeline, take


class Rows(DigitsSource):
    """Digits in blocks of twelve."""

    def load(self, index, rng):
        return np.full((8, 8, 3), rng.integers(256), np.uint8), f"number {index}"

    def blocks(self):
        return np.full(len(self) // 12, 12)

    def size(self, first, last):
        return last - first

    def fetch(self, first, last):
        return [Record(self.key(i), 1, functools.partial(self.load, i)) for i in range(first, last)]


@pytest.fixture
def rows():
    """Read digits in blocks, also as a member of a mixture."""
    with mock.patch.object(digits_module, "DigitsSource", Rows):
        yield digits(samples=240, order="blocks", shuffle_blocks=16)


def test_in_blocks_processes_and_threads_do_not_matter(rows):
    """A resumed run with another number of processes reads the same batches, too."""
    whole = take(rows, 42)
    for start, processes, threads in ((0, 2, 0), (19, 4, 3), (38, 1, 1)):
        config = dataclasses.replace(rows, threads=threads, read_ahead_mib=1)
        found = of_processes(config, 4, processes, start=start)
        assert_same(whole[start : start + 4], found)
    keys = [key for batch in whole for key in batch.keys]
    for epoch in range(2):
        assert len(set(keys[epoch * 240 : (epoch + 1) * 240])) == 240
    assert {batch.reading.bytes_used for batch in whole} == {12}


def test_a_batch_has_the_seconds_for_which_its_records_were_waited_for(rows):
    with mock.patch.object(batches, "CLOCK", autospec=True) as clock:
        clock.now.side_effect = itertools.count()  # each record takes one second
        (batch,) = take(dataclasses.replace(rows, threads=0), 1)
    assert batch.reading.seconds_waited == len(batch.keys) == 12


def test_in_blocks_a_mixture_is_alike_in_processes(rows):
    members = tuple(
        MemberConfig(source=DigitsConfig(samples=count), weight=weight)
        for count, weight in ((120, 3.0), (36, 1.0))
    )
    config = dataclasses.replace(rows, source=MixtureConfig(members=members))
    whole = take(config, 30)
    assert_same(whole[25:], of_processes(config, 5, 3, start=25))
    keys = [key for batch in whole for key in batch.keys]
    assert 260 <= sum(key.startswith("0/") for key in keys) <= 280
    counts = collections.Counter(keys)
    assert {counts[key] for key in counts if key.startswith("0/")} <= {1, 2, 3, 4}


IMAGES = Square(8), Square(16)


@st.composite
def plans(draw):
    """Draw a plan with batches of two sizes and two kinds of images, and a number of processes."""
    processes = draw(st.integers(1, 4))
    pairs = draw(st.lists(st.integers(1, 40), min_size=2, max_size=2))
    kinds = tuple(
        BatchKind(number * processes, images) for number, images in zip(pairs, IMAGES, strict=True)
    )
    kind = draw(st.lists(st.integers(0, 1), min_size=1, max_size=4))
    begin = draw(st.sets(st.integers(1, 6), min_size=len(kind) - 1, max_size=len(kind) - 1))
    return BatchPlan(kinds, np.array([0, *sorted(begin)]), np.array(kind)), processes


@given(made=plans(), sizes=st.sampled_from([(8, 64), (1, 3)]), start=st.integers(0, 5))
def test_pieces_of_all_processes_are_the_batch(made, sizes, start):
    """Each process has consecutive rows of the batch, and loads images of the step's kind."""
    plan, processes = made
    order = np.random.default_rng(0).permutation(1_200)

    def load(position, record, kind):
        assert kind == plan.at(step)
        arrays = {"image": np.full((1, 1, 1, 1), record)}
        return batches.Sample(arrays, {"text": str(record)}, position, f"key {record}", [])

    def tokenize(texts):
        return np.array([[int(text)] for text in texts], np.int32)

    for step in (start, start + 1):
        rows = []
        for process in range(processes):
            with mock.patch.object(batches, "_PIECE", sizes), types_unchecked():
                pieces = batches.GlobalPieces(
                    load, {"text": tokenize}, order, plan, (process, processes)
                )
                each = pieces.number
            units = range(plan.units_before(step), plan.units_before(step + 1))
            numbers = range(units.start * each, units.stop * each)
            rows.append(batches.join([pieces(number) for number in numbers]))
        whole = join(rows)
        positions = range(plan.samples_after(step), plan.samples_after(step + 1))
        records = order[positions.start : positions.stop]
        assert whole.index.tolist() == [*positions]
        assert whole.image.ravel().tolist() == whole.text[:, 0].tolist() == records.tolist()
        assert whole.keys == [f"key {record}" for record in records]
        assert {len(row.keys) for row in rows} == {len(positions) // processes}


def test_a_batch_is_made_in_equal_pieces_of_a_few_dozen_samples():
    load = mock.create_autospec(batches.Load, instance=True)
    numbers = {12: 1, 64: 1, 67: 1, 70: 2, 256: 4, 1024: 16}
    for samples, number in numbers.items():
        plan = constant(2 * samples, Square(8))
        made = batches.GlobalPieces(load, {}, range(9), plan, (1, 2))
        assert made.number == number, samples


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_in_blocks_workers_have_whole_streams(workers):
    streams, load = Streams(256), mock.create_autospec(batches.Load, instance=True)
    made = batches.StreamPieces(load, {}, len, streams, constant(256, Square(8)), workers, 0, 0)
    of_worker = [
        {i % made.number for i in range(3 * made.number) if i % workers == worker}
        for worker in range(workers)
    ]
    assert sum(map(len, of_worker)) == made.number >= streams.count
    assert made.number % workers == 0


def test_blocks_are_read_from_a_bucket_and_any_order_from_a_disk(rows):
    source = Rows(DigitsConfig(samples=240), 8)
    far, near = (DataConfig(source=TarConfig(path=path)) for path in ("gs://b/x.tar", "x.tar"))
    assert pipeline._settled_order(far, source) == "blocks"
    assert pipeline._settled_order(near, source) == "global"
    assert pipeline._settled_order(far, DigitsSource(DigitsConfig(), 8)) == "global"
    members = tuple(MemberConfig(source=one.source) for one in (near, far))
    mixed = DataConfig(source=MixtureConfig(members=members))
    assert pipeline._settled_order(mixed, source) == "blocks"
    anywhere = open_pipeline(dataclasses.replace(rows, order="auto"))
    assert anywhere.order == "global"
    assert anywhere.fingerprints() != open_pipeline(rows).fingerprints()


def test_blocks_that_cannot_be(rows):
    with pytest.raises(ValueError, match=r"in 9 streams, which cannot be divided among 8 proc"):
        open_pipeline(rows, batch_size=72, process=(0, 8))
    with mock.patch.object(Rows, "size", autospec=True, side_effect=lambda _, a, b: (b - a) << 20):
        config = dataclasses.replace(rows, read_ahead_mib=100)
        with pytest.raises(ValueError, match=r"read_ahead_mib=100 is too small: .* 115 MiB"):
            open_pipeline(config)
        open_pipeline(config, process=(0, 2))
    with (
        mock.patch.object(digits_module, "DigitsSource", DigitsSource),
        pytest.raises(ValueError, match=r"data\.order=blocks needs files with many records"),
    ):
        open_pipeline(rows)
