"""Rows that many threads ask for, computed together in few sizes of batch."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from jaxtyping import Float

from clip_jax.clock import CLOCK, Clock


class Full(Exception):
    """More is waiting than may wait."""

    status = 429


class Batcher:
    """One thread that computes whatever is waiting, at most `batch_size` rows at a time.

    While it computes, others queue up: so batches are as large as the load. Their sizes are powers
    of two, or a little less, so that few shapes are compiled and few rows wasted. Whoever has had
    an answer may ask again at once: after a batch of several rows the next begins when as many
    wait again, or none has come for `linger` seconds. A lone row is not held up.
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
        """How many rows are waiting."""
        return len(self._waiting)

    def submit(self, rows: Sequence[Any]) -> list[Future[Float[np.ndarray, " E"]]]:
        """Ask for the features of some rows, in their order. Raises Full; then none is queued."""
        futures: list[Future] = [Future() for _ in rows]
        with self._changed:
            waiting = len(self._waiting)
            if self._closed or waiting + len(rows) > self.capacity:
                raise Full(f"the queue is full: {waiting} of at most {self.capacity} rows wait.")
            self._waiting.extend(zip(futures, rows, strict=True))
            self._changed.notify()
        return futures

    def close(self) -> None:
        """Compute what is waiting, take nothing more, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while taken := self._take():
            taken = [x for x in taken if x[0].set_running_or_notify_cancel()]  # not given up
            if not taken:
                continue
            try:
                features = self._compute([row for _, row in taken])
                self._observe(len(taken))
            except Exception as error:  # whoever waits has to know
                for future, _ in taken:
                    future.set_exception(error)
            else:
                for (future, _), row in zip(taken, features, strict=True):
                    future.set_result(row)

    def _take(self) -> list[tuple[Future, Any]]:
        """Wait for rows; take as many as fill a batch well. None: closed, and nothing is left."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            while len(self._waiting) < self._last and not self._closed:
                if not self._clock.wait(self._changed, self._linger):
                    break
            self._last = count = fitting(min(len(self._waiting), self._batch_size))
            return [self._waiting.popleft() for _ in range(count)]


def fitting(count: int) -> int:
    """Return how many of `count` rows to compute at once: all if padding costs less than an
    eighth, else the largest power of two."""
    above = 1 << max(count - 1, 0).bit_length()
    return count if count >= above * 7 / 8 else above // 2
