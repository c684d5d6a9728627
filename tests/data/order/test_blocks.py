"""The block order: each record once per epoch, from any step on, close to those of its block."""

import itertools
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data.order import blocks
from clip_jax.data.order.blocks import BlockOrder, Equal, OfPositions, Streams, count_streams

ORDER_OF_TWELVE = [
    [1, 4, 9, 8, 11, 7, 0, 5, 2, 3, 10, 6],
    [1, 3, 6, 9, 8, 10, 0, 4, 7, 11, 2, 5],
]
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def in_blocks(sizes, batch_size, *, seed=0, shuffle_blocks=8, shares=OfPositions):
    sizes = np.array(sizes, np.int64)
    shares = shares(Streams(batch_size), int(sizes.sum()))
    return BlockOrder(sizes, seed=seed, shuffle_blocks=shuffle_blocks, shares=shares)


def read(made, batch_size, start, steps, process=(0, 1)):
    """Return a process's records, epochs and pieces of some batches, each as [steps, places]."""
    streams = Streams(batch_size, process)
    runs = [
        made.at(stream, start * streams.width, steps * streams.width)
        for stream in streams.of_process
    ]
    return [
        np.stack([array.reshape(steps, streams.width) for array in arrays], 1).reshape(steps, -1)
        for arrays in zip(*runs, strict=True)
    ]


def test_streams_follow_from_the_batch():
    streams = {1: 1, 12: 12, 64: 64, 72: 9, 256: 16, 1000: 50, 1024: 64, 1536: 96, 4096: 256}
    streams[32768] = 512
    assert {size: count_streams(size) for size in streams} == streams


@given(
    sizes=SIZES,
    batch_size=st.sampled_from([1, 2, 6, 12, 20, 48, 64, 96, 256, 1003]),
    shuffle_blocks=st.sampled_from([1, 16, 64, 1024]),
    chunk=st.sampled_from([1, 13, 1024]),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_every_record_once_an_epoch(sizes, batch_size, shuffle_blocks, chunk, seed, data):
    """Epochs begin at exact positions. A run resumed with several processes reads the same."""
    count = sum(sizes)
    steps = -(-3 * count // batch_size)
    how = {"seed": seed, "shuffle_blocks": shuffle_blocks}
    with mock.patch.object(blocks, "_CHUNK", chunk):
        whole = read(in_blocks(sizes, batch_size, **how), batch_size, 0, steps)
        divisors = [n for n in range(1, 9) if count_streams(batch_size) % n == 0]
        stop = data.draw(st.integers(0, steps - 1))
        processes = data.draw(st.sampled_from(divisors))
        resumed = in_blocks(sizes, batch_size, **how)
        parts = [
            read(resumed, batch_size, stop, steps - stop, process=(process, processes))
            for process in range(processes)
        ]
    for array, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(array[stop:], np.concatenate(pieces, axis=1))
    record, epoch, first, last = (array.reshape(-1) for array in whole)
    for number in range(3):
        inside = slice(number * count, (number + 1) * count)
        assert sorted(record[inside]) == list(range(count))
        assert set(epoch[inside]) == {number}
    assert ((first <= record) & (record < last)).all()


@given(
    sizes=SIZES,
    batch_size=st.sampled_from([1, 6, 12, 20, 64, 256]),
    calls=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 90)), min_size=1, max_size=4),
    shares=st.sampled_from([Equal, OfPositions]),
    chunk=st.sampled_from([7, 1024]),
)
def test_a_stream_s_record_depends_on_its_offset_alone(sizes, batch_size, calls, shares, chunk):
    """Earlier reads, at smaller or larger offsets, make no difference."""
    with mock.patch.object(blocks, "_CHUNK", chunk):
        made = in_blocks(sizes, batch_size, shares=shares)
        for number, (offset, count) in enumerate(calls):
            stream = number % count_streams(batch_size)
            fresh = in_blocks(sizes, batch_size, shares=shares).at(stream, 0, offset + count)
            for array, expected in zip(made.at(stream, offset, count), fresh, strict=True):
                np.testing.assert_array_equal(array, expected[offset:])


def test_a_first_read_at_any_offset_gets_the_stream_s_record():
    """The chunk that contains an offset is estimated, and may be an earlier or a later one."""

    def made():
        return in_blocks([10] * 30, 1, shuffle_blocks=2)

    with mock.patch.object(blocks, "_CHUNK", 7):
        expected = made().at(0, 0, 300).record
        records = [int(made().at(0, offset, 1).record[0]) for offset in range(300)]
    assert records == expected.tolist()


def test_a_record_placed_at_the_end_of_a_stream_is_in_its_last_chunk():
    """A random place may be the upper limit of its range, which no chunk contains."""
    share = mock.create_autospec(blocks._share, side_effect=lambda x: np.full(len(x), 0.75))
    with mock.patch.object(blocks, "_share", share):
        _, run = in_blocks([10], 1)._chunk(epoch=0, stream=0, number=0, chunks=1)
    assert sorted(run.record) == list(range(10))


@given(
    sizes=SIZES,
    batch_size=st.sampled_from([1, 6, 12, 20, 64, 256]),
    start=st.integers(0, 300),
)
def test_equal_shares_give_every_record_once(sizes, batch_size, start):
    """The shares of all streams together hold each record once per epoch."""
    count, streams = sum(sizes), Streams(batch_size)
    made = in_blocks(sizes, batch_size, shares=Equal)
    shares = Equal(streams, count)
    epoch = start // count
    assert not shares(0).any()  # every stream begins with its first record
    assert np.ptp(shares(epoch)) <= 1
    records = []
    for stream in range(streams.count):
        first, last = int(shares(epoch)[stream]), int(shares(epoch + 1)[stream])
        if last > first:
            records += made.at(stream, first, last - first).record.tolist()
    assert sorted(records) == list(range(count))


@given(
    count=st.integers(1, 400),
    size=st.integers(1, 60),
    batch_size=st.sampled_from([1, 2, 12, 64]),
    shuffle_blocks=st.sampled_from([1, 16, 64]),
    shares=st.sampled_from([Equal, OfPositions]),
)
def test_a_piece_is_spread_over_no_more_places_than_a_stream_reaches(
    count, size, batch_size, shuffle_blocks, shares
):
    """A resumed reader looks back as far as `reach` for the records of a piece that were used."""
    sizes = np.full(count, size)
    made = in_blocks(sizes, batch_size, shuffle_blocks=shuffle_blocks, shares=shares)
    places = 2 * int(sizes.sum()) // count_streams(batch_size)
    for stream in range(count_streams(batch_size))[:3]:
        if places:
            run = made.at(stream, 0, places)
            _, pieces = np.unique(np.stack([run.epoch, run.first]), axis=1, return_inverse=True)
            order = np.argsort(pieces.reshape(-1), kind="stable")
            ends = np.flatnonzero(np.diff(pieces.reshape(-1)[order], append=-1))
            starts = np.concatenate([[0], ends[:-1] + 1])
            assert (order[ends] - order[starts]).max() < made.reach(stream)


def test_a_piece_is_read_by_one_stream_in_one_go():
    """A cut between two streams divides a block in two pieces; no other block is divided. A piece
    is spread over about the shuffle buffer."""
    sizes, batch_size, buffer = np.full(400, 50), 64, 64
    made = in_blocks(sizes, batch_size, shuffle_blocks=buffer)
    steps = int(sizes.sum()) // batch_size
    streams = Streams(batch_size)
    _, _, first, _ = read(made, batch_size, 0, steps)
    owners = {}
    for stream in range(streams.count):
        own = first.reshape(steps, streams.count, streams.width)[:, stream].reshape(-1)
        for piece in np.unique(own):
            places = np.flatnonzero(own == piece)
            # The margin is for ranks, which deviate from the random places.
            assert places[-1] - places[0] <= 1.2 * buffer / streams.count * 50
            owners.setdefault(piece, []).append(stream)
    assert all(len(found) == 1 for found in owners.values())
    assert len(owners) <= len(sizes) + streams.count - 1


def test_the_order_is_a_public_format_and_another_for_each_seed():
    """A checkpoint only knows its step: another order would repeat and lose samples on resume."""
    records, other = (
        read(in_blocks([3] * 4, 2, seed=seed), 2, 0, 12)[0].reshape(2, -1).tolist()
        for seed in (0, 1)
    )
    assert records == ORDER_OF_TWELVE
    assert other[0] != records[0]


def test_sorted_data_are_mixed():
    """With data sorted by class, in blocks of 60, batches are similar to independent draws."""
    classes, each, batch_size, steps = 1000, 1280, 1024, 20
    count = classes * each
    made = in_blocks(np.full(count // 60 + 1, 60), batch_size, shuffle_blocks=1024)
    batches = range(0, count // batch_size, count // batch_size // steps)
    labels = [read(made, batch_size, step, 1)[0][0] // each for step in batches]
    counts = np.stack([np.bincount(x, minlength=classes + 1) for x in labels])
    # Pairs of the same class are about as frequent.
    pairs = batch_size * (batch_size - 1) / 2 / classes
    assert 0.9 * pairs < (counts * (counts - 1) // 2).sum(1).mean() < 2 * pairs
    distinct = classes * (1 - (1 - 1 / classes) ** batch_size)
    assert np.count_nonzero(counts, axis=1).mean() > 0.7 * distinct


def test_of_sorted_data_any_time_has_an_even_share():
    """In any fifty batches, shares of classes vary about as much as in independent draws."""
    count, batch_size, steps = 50_000, 128, 50
    made = in_blocks([32] * (count // 32) + [count % 32], batch_size, shuffle_blocks=1024)
    records = read(made, batch_size, 0, 31 * steps)[0].reshape(31, -1)
    for classes in (10, 80, 256):
        shares = np.stack([np.bincount(x, minlength=classes) for x in records * classes // count])
        independent = (steps * batch_size / classes) ** -0.5
        assert shares.std() / shares.mean() < 1.3 * independent  # in a random order: 1.7 to 2.1


def test_epochs_put_others_together():
    """Blocks that are read at the same time in one epoch are not in the next one."""
    made = in_blocks([8] * 4096, 256)  # 16 streams of 256 blocks
    times = [np.argsort(made._epoch(epoch)[0]) % 256 // 4 for epoch in range(4)]
    for before, after in itertools.combinations(times, 2):
        together = np.zeros((64, 64), np.int64)
        np.add.at(together, (before, after), 1)
        assert together.max() <= 8  # 1 of 64 is what chance gives
