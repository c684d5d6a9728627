"""Time and waiting. Code that waits takes a `Clock`, so that tests can pass their own."""

import asyncio
import threading
import time
from collections.abc import Collection
from typing import Any


class Clock:
    """The clock of this machine, in seconds."""

    def now(self) -> float:
        """Return seconds since a fixed moment in the past; they never decrease."""
        return time.monotonic()

    def unix(self) -> float:
        """Return seconds since 1970, which files record."""
        return time.time()

    def thread_cpu(self) -> float:
        """Return seconds for which a processor has worked on this thread."""
        return time.thread_time()

    def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        time.sleep(seconds)

    def wait(self, event: threading.Event | threading.Condition, seconds: float | None) -> bool:
        """Wait until an event is set, or a held condition notified; False after `seconds`."""
        return event.wait(seconds)

    async def first(
        self, futures: Collection["asyncio.Future[Any]"], seconds: float | None
    ) -> tuple[set["asyncio.Future[Any]"], set["asyncio.Future[Any]"]]:
        """Wait until one of the futures is done; return (done, pending), none done after `seconds`.

        Call it from a coroutine of the futures' event loop.
        """
        return await asyncio.wait(futures, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


CLOCK = Clock()  # the default
