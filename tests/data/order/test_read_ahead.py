"""Reading blocks ahead: each is read once, within the budget of memory; errors are passed on."""

import collections
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data.order.blocks import BlockOrder, OfPositions, Streams
from clip_jax.data.order.read_ahead import ReadAhead
from clip_jax.data.sources import Record, SampleError
from tests.data.conftest import Numbers

BATCH, BLOCK, SIZE = 256, 10, 100
LANES = Streams(BATCH)


class Blocks(Numbers):
    """Records of 100 bytes in blocks of ten; `asked` lists the reads."""

    def __init__(self, count, fail=None):
        super().__init__(count)
        self.fail, self.asked = fail or {}, []  # errors by block

    def blocks(self):
        return np.full(self.count // BLOCK, BLOCK, np.int64)

    def size(self, first, last):
        return (last - first) * SIZE

    def fetch(self, first, last):
        self.asked.append((first, last))
        if first // BLOCK in self.fail:
            raise self.fail[first // BLOCK]
        return [
            Record(str(i), SIZE, lambda rng, i=i: self.load(i, rng)) for i in range(first, last)
        ]


def order_of(source):
    shares = OfPositions(LANES, len(source))
    return BlockOrder(source.blocks(), seed=0, shuffle_blocks=64, shares=shares)


def open_ahead(source, *, start=0, budget=1 << 20, streams=LANES.of_process):
    return ReadAhead(
        source, order_of(source), streams, width=LANES.width, start=start, budget=budget
    )


def requests(ahead, steps, streams):
    """Yield (step, record, piece) in the order of use; a piece is (epoch, first record)."""
    for step in steps:
        for stream in streams:
            for record, epoch, first, _ in np.stack(ahead.run(step, stream), axis=1).tolist():
                yield step, record, (epoch, first)


def take(ahead, steps, streams=LANES.of_process):
    taken = []
    for step, record, piece in requests(ahead, steps, streams):
        assert ahead.take(step, record, piece).key == str(record)
        taken.append(record)
    return taken


def test_every_piece_is_asked_for_once_in_time_and_closing_ends_the_threads():
    """Even with enough memory, at most two batches and the shuffle buffer are read ahead."""
    source, before = Blocks(100 * BATCH), set(threading.enumerate())
    ahead, taken = open_ahead(source), []
    started = set(threading.enumerate()) - before
    for step in range(100):
        taken += take(ahead, [step])
        assert len(source.asked) * BLOCK <= (step + 4) * BATCH + 2 * 64 * BLOCK
    ahead.close()
    assert sorted(taken) == list(range(100 * BATCH))
    assert max(map(source.asked.count, source.asked)) <= 2  # in this epoch and the next
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_what_is_held_stays_within_the_budget():
    """At least half of the budget is used on average."""
    source = Blocks(32_000)
    budget = 64 * BLOCK * SIZE
    ahead = open_ahead(source, budget=budget)
    held = []
    for step in range(50):
        take(ahead, [step])
        held.append(ahead._held)
    ahead.close()
    assert max(held) <= budget
    assert np.mean(held) > budget / 2


class Uneven(Blocks):
    """Blocks of any size, some of which cannot be read."""

    def __init__(self, sizes, fail):
        super().__init__(sum(sizes))
        self.sizes, self.failing = np.array(sizes, np.int64), fail

    def blocks(self):
        return self.sizes

    def fetch(self, first, last):
        if self.fails(first):
            self.asked.append((first, last))
            raise SampleError("gone")
        return super().fetch(first, last)

    def fails(self, record):
        return int(np.searchsorted(np.cumsum(self.sizes), record, "right")) in self.failing


@given(
    sizes=st.lists(st.integers(1, 30), min_size=10, max_size=30),
    fail=st.sets(st.integers(0, 29), max_size=3),
    start=st.integers(0, 60),
    budget=st.sampled_from([1, 3_000, 1 << 20]),
    part=st.sampled_from([slice(None), slice(6), slice(6, 12)]),
)
def test_from_any_step_on_each_record_is_read_once(sizes, fail, start, budget, part):
    """Each process reads the records of its streams, in their order. A block that cannot be read
    gives bad samples. Records that have been used, also before a resumption, are not held."""
    source, lanes, end = Uneven(sizes, fail), Streams(12), start + 5
    shares, streams = OfPositions(lanes, len(source)), lanes.of_process[part]
    order = BlockOrder(source.blocks(), seed=0, shuffle_blocks=24, shares=shares)
    ahead = ReadAhead(source, order, streams, width=lanes.width, start=start, budget=budget)
    for step, record, piece in requests(ahead, range(start, end), streams):
        try:
            assert ahead.take(step, record, piece).key == str(record)
            assert not source.fails(record)
        except SampleError:
            assert source.fails(record)
    ahead.close()
    later: dict[tuple[int, int], set[int]] = {}  # records not yet used, by piece
    pieces = set()
    for stream in streams:
        run = order.at(stream, 0, end + 200)
        for at, (record, epoch, first, last) in enumerate(np.stack(run, axis=1).tolist()):
            pieces.add((epoch, first, last))
            later.setdefault((epoch, first), set()).update([record] * (at >= end))
    with ahead._lock:
        for key, piece in ahead._pieces.items():
            assert ahead._left[key] == len(later[key])
            if piece.records is not None:
                is_held = [record in later[key] for record in range(key[1], piece.last)]
                assert [x is not None for x in piece.records] == is_held
    times = collections.Counter((first, last) for _, first, last in pieces)
    assert collections.Counter(source.asked) <= times


def test_a_bug_in_a_source_reaches_who_waits():
    ahead = open_ahead(Blocks(640, fail={0: ZeroDivisionError()}))
    with pytest.raises(ZeroDivisionError):
        take(ahead, [0])
    ahead.close()
