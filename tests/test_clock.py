"""The clock that is moved by hand waits as the real one does; unit tests have no other."""

import asyncio
import socket
import subprocess
import time

import pytest

from clip_jax.clock import CLOCK
from tests.clock import HandClock


@pytest.mark.parametrize("clock", [CLOCK, HandClock()], ids=["real", "by hand"])
def test_a_wait_for_futures_ends_with_the_first_or_when_its_time_has_come(clock):
    async def wait():
        loop = asyncio.get_running_loop()
        one, other = loop.create_future(), loop.create_future()
        loop.call_soon(other.set_result, None)
        assert await clock.first({one, other}, 60) == ({other}, {one})
        if clock is not CLOCK:
            loop.call_soon(clock.advance, 60)
        assert await clock.first({one}, 0 if clock is CLOCK else 60) == (set(), {one})

    asyncio.run(wait())


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
