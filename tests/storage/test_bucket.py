"""When a range of an object is asked for once more, on a clock that the test moves."""

import asyncio
from collections import deque
from unittest import mock

import obstore
import pytest

from clip_jax.storage import bucket
from tests.clock import HandClock


def ask(*waits, usual=(), answers):
    """Ask for a range; return the number of requests after each wait, the answer, the durations.

    `answers` are given at the end, each to the request of its number: bytes or an error.
    """
    requests: list[asyncio.Future[bytes]] = []
    clock, seconds = HandClock(), deque(usual, maxlen=64)

    def request(store, path, *, start, end):
        assert (store, path, start, end) == ("store", "key", 3, 7)
        requests.append(asyncio.get_running_loop().create_future())
        return requests[-1]

    async def turns():
        for _ in range(10):  # of the event loop, more than the code takes
            await asyncio.sleep(0)

    async def main():
        task, counts = asyncio.ensure_future(bucket._range("store", "key", 3, 7)), []
        await turns()
        for wait in waits:
            clock.advance(wait)
            await turns()
            counts.append(len(requests))
        for number, answer in answers.items():
            assert not task.done()
            set_it = requests[number].set_result if answer else requests[number].set_exception
            set_it(answer or OSError(f"cut {number}"))
            await turns()
        answer = await task
        assert all(request.done() for request in requests)  # answered or cancelled
        return counts, answer, [*seconds]

    with (
        mock.patch.object(obstore, "get_range_async", autospec=True, side_effect=request),
        mock.patch.object(bucket, "CLOCK", clock),
        mock.patch.object(bucket, "_seconds", seconds),
    ):
        return asyncio.run(main())


def test_a_late_answer_is_asked_for_again_at_growing_intervals_and_the_soonest_counts():
    waits = (0.9, 0.1, 1.9, 0.1, 4, 1000)  # at most four at a time
    assert ask(*waits, answers={2: b"third"}) == ([1, 2, 2, 3, 4, 4], b"third", [1007.0])
    assert ask(0.5, answers={0: b"first"}) == ([1], b"first", [0.5])


def test_late_is_four_times_the_usual():
    usual = [1.0, 2.0, 30.0]
    answer = ask(7.9, 0.2, usual=usual, answers={0: b"first"})
    assert answer == ([1, 2], b"first", [*usual, pytest.approx(8.1)])


def test_an_error_counts_once_no_other_request_is_waited_for():
    assert ask(1, answers={0: None, 1: b"second"})[:2] == ([2], b"second")
    with pytest.raises(OSError, match="cut 0"):
        ask(1, answers={1: None, 0: None})
