"""A clock that a test sets."""

import asyncio
import functools
import threading
from collections.abc import Callable, Collection
from typing import Any

from clip_jax.clock import Clock


class HandClock(Clock):
    """A clock whose time changes only by `advance`, which ends the waits that are due.

    `until_waiting` blocks until another thread or a coroutine waits, so that `advance` cannot come
    too early. With `skips`, `sleep` advances the clock instead of waiting for `advance`.
    """

    def __init__(self, *, skips: bool = False) -> None:
        self._time, self._skips = 1_000.0, skips
        self._begun = threading.Condition()
        self._wakers: list[Callable[[], Any]] = []  # one for each wait
        self.slept: list[float] = []  # what `sleep` was called with

    def now(self) -> float:
        return self._time

    def unix(self) -> float:
        return 1_700_000_000.0 + self._time

    def advance(self, seconds: float) -> None:
        """Advance the time, and end the waits that are due."""
        with self._begun:
            self._time += seconds
            wakers = [*self._wakers]
        for wake in wakers:
            wake()

    def until_waiting(self) -> None:
        """Block until a thread or coroutine waits for this clock."""
        with self._begun:
            assert self._begun.wait_for(lambda: self._wakers, 60), "nobody waits"

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
        """Wait until a condition, which is held, is notified; return False if `end` comes first."""

        def wake() -> None:
            with condition:  # which is free once `condition.wait` has begun
                condition.notify_all()

        if not self._begin(wake, end):
            return False
        try:
            condition.wait()
        finally:
            self._wakers.remove(wake)
        return self._time < end

    async def first(
        self, futures: Collection["asyncio.Future[Any]"], seconds: float | None
    ) -> tuple[set["asyncio.Future[Any]"], set["asyncio.Future[Any]"]]:
        end = float("inf") if seconds is None else self._time + seconds
        loop = asyncio.get_running_loop()
        while True:
            moved: asyncio.Future[None] = loop.create_future()
            wake = functools.partial(loop.call_soon_threadsafe, moved.cancel)
            if not self._begin(wake, end):
                return set(), set(futures)
            try:
                done, _ = await asyncio.wait({*futures, moved}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._wakers.remove(wake)
            if done := done - {moved}:
                return done, set(futures) - done

    def _begin(self, wake: Callable[[], Any], end: float) -> bool:
        """Let `advance` call `wake` from now on, unless `end` has passed."""
        with self._begun:
            if waits := self._time < end:
                self._wakers.append(wake)
                self._begun.notify_all()
            return waits
