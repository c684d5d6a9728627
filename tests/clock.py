"""A clock that a test moves by hand."""

import asyncio
import threading
from collections.abc import Collection
from typing import Any

from clip_jax.clock import Clock


class HandClock(Clock):
    """Time stands still until `advance`. Waits of other threads end when their time has come.

    `waiting` tells how many threads and coroutines wait for this clock at the moment;
    `until_waiting` blocks until there are so many, so that a test knows that `advance` will reach
    them. With `skips`, a `sleep` moves the clock itself instead of waiting for `advance`.
    """

    def __init__(self, *, skips: bool = False) -> None:
        self._time, self._skips = 1_000.0, skips
        self._moved = threading.Condition()
        self._conditions: list[threading.Condition] = []
        self._futures: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self.slept: list[float] = []  # what `sleep` was called with

    def now(self) -> float:
        return self._time

    def unix(self) -> float:
        return 1_700_000_000.0 + self._time

    def advance(self, seconds: float) -> None:
        """Move the time on and end the waits that it ends."""
        with self._moved:
            self._time += seconds
            self._moved.notify_all()
            conditions, futures = [*self._conditions], [*self._futures]
        for condition in conditions:
            with condition:
                condition.notify_all()
        for loop, future in futures:
            loop.call_soon_threadsafe(_finish, future)

    @property
    def waiting(self) -> int:
        return len(self._conditions) + len(self._futures)

    def until_waiting(self, count: int = 1) -> None:
        """Block until so many threads and coroutines wait for this clock."""
        with self._moved:
            assert self._moved.wait_for(lambda: self.waiting >= count, 60), "nobody waits"

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        if self._skips:
            self.advance(seconds)
        else:
            self.wait(threading.Event(), seconds)

    def wait(self, event: threading.Event | threading.Condition, seconds: float | None) -> bool:
        end = float("inf") if seconds is None else self._time + seconds
        if isinstance(event, threading.Condition):
            return self._wait(event, end)
        condition: threading.Condition = vars(event)["_cond"]  # which `set` notifies
        with condition:
            while not event.is_set():
                if not self._wait(condition, end):
                    return False
            return True

    def _wait(self, condition: threading.Condition, end: float) -> bool:
        """Wait until a held condition is notified, by whomever; False once `end` has come."""
        with self._moved:
            if self._time >= end:
                return False
            self._conditions.append(condition)
            self._moved.notify_all()
        try:
            condition.wait()  # `advance` cannot notify before it is released here
        finally:
            with self._moved:
                self._conditions.remove(condition)
        return self._time < end

    async def first(
        self, futures: Collection["asyncio.Future[Any]"], seconds: float | None
    ) -> tuple[set["asyncio.Future[Any]"], set["asyncio.Future[Any]"]]:
        end = float("inf") if seconds is None else self._time + seconds
        loop = asyncio.get_running_loop()
        while True:
            moved: asyncio.Future[None] = loop.create_future()
            with self._moved:
                if self._time >= end:
                    return set(), set(futures)
                self._futures.append((loop, moved))
                self._moved.notify_all()
            try:
                done, _ = await asyncio.wait({*futures, moved}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._futures.remove((loop, moved))
            done.discard(moved)
            if done:
                return done, set(futures) - done


def _finish(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
