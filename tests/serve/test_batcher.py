"""Rows from many threads: none lost, none mixed up, and in batches."""

import threading
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import pytest

from clip_jax.serve.batcher import Batcher, Full, fitting
from tests.clock import HandClock


def twice(rows):
    return 2 * np.stack(rows)


def result(futures):
    """All rows of one request."""
    return np.stack([future.result(30) for future in futures])


def test_every_thread_gets_its_own_rows():
    sizes = []
    batcher = Batcher(twice, 8, 10_000, sizes.append)

    def ask(i):
        rows = [np.full(3, 10 * i + k, np.float32) for k in range(i % 4 + 1)]
        found = result(batcher.submit(rows))
        np.testing.assert_array_equal(found, 2 * np.stack(rows))

    with ThreadPoolExecutor(16) as threads:
        for future in wait([threads.submit(ask, i) for i in range(200)]).done:
            future.result()
    batcher.close()
    assert sum(sizes) == 500
    assert max(sizes) <= 8


def test_what_waits_is_bounded_and_computed_together():
    busy, go, sizes = threading.Event(), threading.Event(), []

    def compute(rows):
        busy.set()
        go.wait(30)
        return np.stack(rows)

    batcher = Batcher(compute, 4, 6, sizes.append)
    first = batcher.submit([np.zeros(1, np.float32)])
    assert busy.wait(30)  # it no longer waits
    waiting = [batcher.submit([np.full(1, i, np.float32)] * 2) for i in range(3)]
    with pytest.raises(Full, match="6 of at most 6 rows wait"):
        batcher.submit([np.zeros(1, np.float32)])
    go.set()
    assert [float(result(futures)[1, 0]) for futures in waiting] == [0, 1, 2]
    assert result(first).shape == (1, 1)
    batcher.close()
    assert sizes == [1, 4, 2]
    with pytest.raises(Full):
        batcher.submit([np.zeros(1, np.float32)])


def test_those_who_ask_again_are_computed_together():
    sizes, clock = [], HandClock()
    batcher = Batcher(twice, 8, 10, sizes.append, linger=600, clock=clock)
    row = np.ones(1, np.float32)
    for rows in (1, 1, 4):  # nobody has to be waited for
        result(batcher.submit([row] * rows))
    for futures in [batcher.submit([row]) for _ in range(4)]:
        result(futures)
    [alone] = batcher.submit([row])
    clock.until_waiting()
    assert not alone.done()
    clock.advance(600)  # three more have not come
    assert alone.result(30) == 2
    result(batcher.submit([row] * 4))
    [last] = batcher.submit([row])
    batcher.close()  # ends the wait too
    assert last.result(30) == 2
    assert sizes == [1, 1, 4, 4, 1, 4, 1]


def test_an_error_reaches_who_asked_and_no_one_later():
    def compute(rows):
        if max(rows) > 5:
            raise ValueError("too large")
        return np.stack(rows)

    batcher = Batcher(compute, 4, 10)
    with pytest.raises(ValueError, match="too large"):
        result(batcher.submit([np.full(1, 6, np.float32)] * 6))
    assert result(batcher.submit([np.ones(1, np.float32)])).sum() == 1
    batcher.close()


@pytest.mark.parametrize(
    ("count", "taken"),
    [(0, 0), (1, 1), (2, 2), (3, 2), (7, 7), (8, 8), (13, 8), (14, 14), (64, 64)],
)
def test_sizes_are_powers_of_two_or_a_little_less(count, taken):
    assert fitting(count) == taken
