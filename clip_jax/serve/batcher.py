"""Dynamic batching: rows submitted by many threads are computed together."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from jaxtyping import Float

from clip_jax.clock import CLOCK, Clock


class Full(Exception):
    """The queue is full."""

    status = 429


class Batcher:
    """A thread that computes pending rows, at most `batch_size` at a time.

    Rows queue while a batch is computed, so batches grow with the load. Their sizes are powers of
    two, or a little less, so that few shapes are compiled and few rows are padding. Clients often
    send the next request after an answer: so after a batch of several rows, the next starts when
    as many are pending again, or none has come for `linger` seconds. A single row does not wait.
    """

    def __init__(
        self,
        compute: Callable[[list[Any]], Float[np.ndarray, "B E"]],
        batch_size: int,
        capacity: int,
        observe: Callable[[int], None] = lambda rows: None,
        linger: float = 0.01,
        clock: Clock = CLOCK,
    ) -> None:
        self._compute, self._batch_size, self._observe = compute, batch_size, observe
        self.capacity, self._linger, self._last = capacity, linger, 0
        self._clock = clock
        self._waiting: deque[tuple[Future[Float[np.ndarray, " E"]], Any]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Number of pending rows."""
        return len(self._waiting)

    def submit(self, rows: Sequence[Any]) -> list[Future[Float[np.ndarray, " E"]]]:
        """Queue rows; return their features as futures, in order. Raises Full, with none queued."""
        futures: list[Future] = [Future() for _ in rows]
        with self._changed:
            waiting = len(self._waiting)
            if self._closed or waiting + len(rows) > self.capacity:
                raise Full(f"the queue is full: {waiting} of at most {self.capacity} rows wait.")
            self._waiting.extend(zip(futures, rows, strict=True))
            self._changed.notify()
        return futures

    def close(self) -> None:
        """Compute the pending rows, accept no more, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while taken := self._take():
            taken = [x for x in taken if x[0].set_running_or_notify_cancel()]  # not cancelled
            if not taken:
                continue
            try:
                features = self._compute([row for _, row in taken])
                self._observe(len(taken))
            except Exception as error:  # passed on to the clients
                for future, _ in taken:
                    future.set_exception(error)
            else:
                for (future, _), row in zip(taken, features, strict=True):
                    future.set_result(row)

    def _take(self) -> list[tuple[Future, Any]]:
        """Wait for rows and take a batch of them. None: closed, and none is pending."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            while len(self._waiting) < self._last and not self._closed:
                if not self._clock.wait(self._changed, self._linger):
                    break
            self._last = count = fitting(min(len(self._waiting), self._batch_size))
            return [self._waiting.popleft() for _ in range(count)]


def fitting(count: int) -> int:
    """Return how many of `count` rows to compute at once.

    All, if they are padded to a power of two by less than an eighth, else the largest power of two.
    """
    above = 1 << max(count - 1, 0).bit_length()
    return count if count >= above * 7 / 8 else above // 2
