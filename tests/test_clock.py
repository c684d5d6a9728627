"""The clock that is moved by hand waits as the real one does; unit tests have no other."""

import asyncio
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from clip_jax.clock import CLOCK
from tests.clock import HandClock


@pytest.mark.parametrize("kind", [threading.Event, threading.Condition])
def test_a_wait_ends_with_its_time_and_not_before(kind):
    clock, waited = HandClock(), kind()

    def wait() -> bool:
        if isinstance(waited, threading.Event):
            return clock.wait(waited, 5)
        with waited:
            return clock.wait(waited, 5)

    with ThreadPoolExecutor() as pool:
        result = pool.submit(wait)
        clock.until_waiting()
        clock.advance(5)
        assert result.result() is False
        result = pool.submit(wait)
        clock.until_waiting()
        if isinstance(waited, threading.Event):
            waited.set()
        else:
            with waited:
                waited.notify()
        assert result.result() is True
    assert clock.now() == 1_005


@pytest.mark.parametrize("is_real", [True, False])
def test_the_first_of_several_futures_ends_a_wait(is_real):
    clock = CLOCK if is_real else HandClock()

    async def first():
        loop = asyncio.get_running_loop()
        one, other = loop.create_future(), loop.create_future()
        loop.call_soon(other.set_result, None)
        return await clock.first({one, other}, 60) == ({other}, {one})

    assert asyncio.run(first())


def test_a_wait_for_futures_ends_with_its_time():
    clock = HandClock()

    async def first():
        never = asyncio.get_running_loop().create_future()
        return await clock.first({never}, 3) == (set(), {never})

    with ThreadPoolExecutor() as pool:
        result = pool.submit(asyncio.run, first())
        clock.until_waiting()
        clock.advance(3)
        assert result.result()


def bind_a_socket() -> None:
    with socket.socket() as one:
        one.bind(("localhost", 0))


@pytest.mark.parametrize(
    "call",
    [
        lambda: time.sleep(0),
        lambda: time.monotonic(),
        lambda: subprocess.run(["true"], check=True),
        bind_a_socket,
    ],
    ids=["sleep", "time", "process", "socket"],
)
def test_unit_tests_neither_wait_nor_reach_beyond_this_process(call):
    with pytest.raises(AssertionError, match="in a unit test"):
        call()
