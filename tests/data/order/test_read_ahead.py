"""Blocks read ahead: each once, within the budget, and what becomes of those that fail."""

import threading

import numpy as np
import pytest

from clip_jax.data.order.blocks import BlockOrder, OfPositions, Streams
from clip_jax.data.order.read_ahead import ReadAhead
from clip_jax.data.sources import Record, SampleError
from tests.data.conftest import Numbers

BATCH, BLOCK, SIZE = 256, 10, 100
LANES = Streams(BATCH)


class Blocks(Numbers):
    """Records of 100 bytes in blocks of ten, which know what was asked of them."""

    def __init__(self, count, fail=None):
        super().__init__(count)
        self.fail, self.asked = fail or {}, []  # by block, an error

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
    """Record, and epoch and first record of its piece, in the order in which they are needed."""
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
    """Not long before its time, though there is room for it: two batches and the buffer."""
    source, before = Blocks(100 * BATCH), set(threading.enumerate())
    ahead, taken = open_ahead(source), []
    started = set(threading.enumerate()) - before
    for step in range(100):
        taken += take(ahead, [step])
        assert len(source.asked) * BLOCK <= (step + 4) * BATCH + 2 * 64 * BLOCK
    ahead.close()
    assert sorted(taken) == list(range(100 * BATCH))
    assert max(map(source.asked.count, source.asked)) <= 2  # of this epoch and the next
    for thread in started:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_what_is_held_stays_within_the_budget():
    """Half of the buffer is used on average, and no more is read ahead than the budget has."""
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


@pytest.mark.parametrize("start", [1, 24, 60])
def test_resumed_it_holds_only_what_is_still_to_come(start):
    source = Blocks(6400)
    ahead, whole = open_ahead(source, start=start), open_ahead(Blocks(6400))
    found, wanted = take(ahead, [start]), take(whole, range(start + 1))
    with ahead._lock, whole._lock:
        for key, piece in ahead._pieces.items():
            if piece.used and piece.records:
                records = whole._pieces[key].records
                assert records
                assert [x is None for x in piece.records] == [x is None for x in records]
    end = start + 41  # within an epoch: pieces are begun, however far anybody has read ahead
    found += take(ahead, range(start + 1, end))
    wanted += take(whole, range(start + 1, end))
    assert found == wanted[start * BATCH :]
    for one in (ahead, whole):
        one.close()
    both = ahead._left.keys() & whole._left.keys()
    assert both
    assert all(ahead._left[key] == whole._left[key] for key in both)


def test_a_stream_of_a_process_reads_only_its_own():
    """Two halves of the streams ask for the pieces of the whole, none for another's."""
    sources = [Blocks(6400), Blocks(6400)]
    halves = [LANES.of_process[:8], LANES.of_process[8:]]
    for source, streams in zip(sources, halves, strict=True):
        ahead = open_ahead(source, streams=streams)
        take(ahead, range(25), streams)
        ahead.close()
    run = order_of(sources[0]).at(0, 0, 400)
    pieces = set(zip(run.first.tolist(), run.last.tolist(), strict=True))
    assert pieces <= set(sources[0].asked)
    assert sum(len(source.asked) for source in sources) < 3 * (640 + 15)


def test_a_block_that_cannot_be_read_is_bad_samples():
    source = Blocks(2560, fail={3: SampleError("gone")})
    ahead = open_ahead(source)
    failed = []
    for step, record, piece in requests(ahead, range(10), LANES.of_process):
        try:
            assert ahead.take(step, record, piece).key == str(record)
        except SampleError:
            failed.append(record)
    ahead.close()
    assert sorted(failed) == list(range(30, 40))


def test_a_bug_in_a_source_reaches_who_waits():
    ahead = open_ahead(Blocks(640, fail={0: ZeroDivisionError()}))
    with pytest.raises(ZeroDivisionError):
        take(ahead, [0])
    ahead.close()
