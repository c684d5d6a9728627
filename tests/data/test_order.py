"""The order in stretches: each record once an epoch, from any step on, near its neighbours."""

import itertools
import pickle
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_jax.data import order
from clip_jax.data.order import Equal, Lanes, OfPositions, StretchOrder, count_lanes

ORDER_OF_TWELVE = [
    [1, 4, 9, 8, 11, 7, 0, 5, 2, 3, 10, 6],
    [1, 3, 6, 9, 8, 10, 0, 4, 7, 11, 2, 5],
]
SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def in_stretches(sizes, batch_size, *, seed=0, window=8, shares=OfPositions):
    sizes = np.array(sizes, np.int64)
    shares = shares(Lanes(batch_size), int(sizes.sum()))
    return StretchOrder(sizes, seed=seed, window=window, shares=shares)


def read(made, batch_size, start, steps, part=(0, 1)):
    """Records and pieces of some batches, as far as a process has them: [steps, places]."""
    lanes = Lanes(batch_size, part)
    runs = [made.at(lane, start * lanes.width, steps * lanes.width) for lane in lanes.own]
    return [
        np.stack([array.reshape(steps, lanes.width) for array in arrays], 1).reshape(steps, -1)
        for arrays in zip(*runs, strict=True)
    ]


def test_lanes_follow_from_the_batch():
    lanes = {1: 1, 12: 12, 64: 64, 72: 9, 256: 16, 1000: 50, 1024: 64, 1536: 96, 4096: 256}
    lanes[32768] = 512
    assert {size: count_lanes(size) for size in lanes} == lanes


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=SIZES,
    batch_size=st.sampled_from([1, 2, 6, 12, 20, 48, 64, 96, 256, 1003]),
    window=st.sampled_from([1, 16, 64, 1024]),
    chunk=st.sampled_from([1, 13, 1024]),
    data=st.data(),
)
def test_every_record_once_an_epoch(sizes, batch_size, window, chunk, data):
    """In the epochs' exact positions, and alike where one stops and goes on with processes."""
    count = sum(sizes)
    steps = -(-3 * count // batch_size)
    with mock.patch.object(order, "_CHUNK", chunk):
        whole = read(in_stretches(sizes, batch_size, window=window), batch_size, 0, steps)
        divisors = [n for n in range(1, 9) if count_lanes(batch_size) % n == 0]
        stop = data.draw(st.integers(0, steps - 1))
        processes = data.draw(st.sampled_from(divisors))
        resumed = pickle.loads(pickle.dumps(in_stretches(sizes, batch_size, window=window)))
        parts = [
            read(resumed, batch_size, stop, steps - stop, part=(process, processes))
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


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    sizes=SIZES,
    batch_size=st.sampled_from([1, 6, 12, 20, 64, 256]),
    start=st.integers(0, 300),
)
def test_equal_shares_give_every_record_once(sizes, batch_size, start):
    """The shares of all lanes in an epoch hold each record once, whatever each lane has had."""
    count, lanes = sum(sizes), Lanes(batch_size)
    made = in_stretches(sizes, batch_size, shares=Equal)
    shares = Equal(lanes, count)
    epoch = start // count
    records = []
    for lane in range(lanes.count):
        first, last = int(shares(epoch)[lane]), int(shares(epoch + 1)[lane])
        if last > first:
            records += made.at(lane, first, last - first).record.tolist()
    assert sorted(records) == list(range(count))


def test_a_piece_is_read_by_one_lane_in_one_go():
    """A lane's cut divides a stretch in two; there are no more pieces, and none reaches farther
    than the window."""
    sizes, batch_size, window = np.full(400, 50), 64, 64
    made = in_stretches(sizes, batch_size, window=window)
    steps = int(sizes.sum()) // batch_size
    lanes = Lanes(batch_size)
    _, _, first, _ = read(made, batch_size, 0, steps)
    owners = {}
    for lane in range(lanes.count):
        own = first.reshape(steps, lanes.count, lanes.width)[:, lane].reshape(-1)
        for piece in np.unique(own):
            places = np.flatnonzero(own == piece)
            # Of ranks, whose places jitter.
            assert places[-1] - places[0] <= 1.2 * window / lanes.count * 50
            owners.setdefault(piece, []).append(lane)
    assert all(len(found) == 1 for found in owners.values())
    assert len(owners) <= len(sizes) + lanes.count - 1


def test_the_order_is_a_public_format_and_another_for_each_seed():
    """A checkpoint only knows its step: another order would repeat and lose samples on resume."""
    records, other = (
        read(in_stretches([3] * 4, 2, seed=seed), 2, 0, 12)[0].reshape(2, -1).tolist()
        for seed in (0, 1)
    )
    assert records == ORDER_OF_TWELVE
    assert other[0] != records[0]


def test_sorted_data_are_mixed():
    """Photographs sorted by class, in stretches of 60: batches much like independent draws."""
    classes, each, batch_size, steps = 1000, 1280, 1024, 20
    count = classes * each
    made = in_stretches(np.full(count // 60 + 1, 60), batch_size, window=1024)
    batches = range(0, count // batch_size, count // batch_size // steps)
    labels = [read(made, batch_size, step, 1)[0][0] // each for step in batches]
    counts = np.stack([np.bincount(x, minlength=classes + 1) for x in labels])
    # What lies together meets, and not too often.
    pairs = batch_size * (batch_size - 1) / 2 / classes
    assert 0.9 * pairs < (counts * (counts - 1) // 2).sum(1).mean() < 2 * pairs
    distinct = classes * (1 - (1 - 1 / classes) ** batch_size)
    assert np.count_nonzero(counts, axis=1).mean() > 0.7 * distinct


def test_of_sorted_data_any_time_has_an_even_share():
    """Of any fifty batches, each class has about as even a share as in independent draws."""
    count, batch_size, steps = 50_000, 128, 50
    made = in_stretches([32] * (count // 32) + [count % 32], batch_size, window=1024)
    records = read(made, batch_size, 0, 31 * steps)[0].reshape(31, -1)
    for classes in (10, 80, 256):
        shares = np.stack([np.bincount(x, minlength=classes) for x in records * classes // count])
        independent = (steps * batch_size / classes) ** -0.5
        assert shares.std() / shares.mean() < 1.3 * independent  # in a random order: 1.7 to 2.1


def test_epochs_put_others_together():
    """Stretches that come together in an epoch do not in the next one."""
    made = in_stretches([8] * 4096, 256)  # 16 lanes of 256 stretches
    times = [np.argsort(made._epoch(epoch)[0]) % 256 // 4 for epoch in range(4)]
    for before, after in itertools.combinations(times, 2):
        together = np.zeros((64, 64), np.int64)
        np.add.at(together, (before, after), 1)
        assert together.max() <= 8  # 1 of 64 is what chance gives
