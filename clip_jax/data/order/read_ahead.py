"""Fetch blocks of files before their records are needed, by several requests at once, within a
budget of bytes; each record is released when it is used."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clip_jax.clock import CLOCK
from clip_jax.data.order.blocks import Run, StreamOrder
from clip_jax.data.sources import AnyRecord, BlockSource, SampleError

_REQUESTS = 16  # at once; at 4 MiB in 100 ms each, 640 MiB/s
_AHEAD = 16  # 1/16 of the budget limits the samples between consuming and reading: 256 MiB
_LOOK = 0.1  # seconds between checks for free memory, if no thread signals it

_Key = tuple[int, int]  # epoch, and first record of a piece


@dataclass
class _Piece:
    """Records of one request, as long as some of them are unused."""

    key: _Key
    last: int
    used: set[int]  # records that were used before the run was resumed
    size: int  # bytes held; an estimate until the records are read
    records: list[AnyRecord | SampleError | None] | None = None  # None: not read yet

    @property
    def count(self) -> int:
        return self.last - self.key[1]


class ReadAhead:
    """The records of some streams from a step on. Close it to stop its threads."""

    def __init__(
        self,
        source: BlockSource,
        order: StreamOrder,
        streams: Sequence[int],
        *,
        width: int,
        start: int,
        budget: int,
    ) -> None:
        """`width` is a stream's places in a batch, `start` the first step, `budget` in bytes."""
        self._source, self._order, self._streams, self._width = source, order, streams, width
        self._start, self._budget = start, budget
        records = width * len(streams)  # a step
        size = max(source.size(0, len(source)) / len(source) * records, 1)
        self._ahead = max(2, min(int(budget / _AHEAD / size), len(source) // records))  # steps
        self._lock = threading.Lock()
        self._arrived, self._room, self._work = (threading.Condition(self._lock) for _ in range(3))
        self._pieces: dict[_Key, _Piece] = {}
        self._left: dict[_Key, int] = {}  # records of each that have not been taken
        self._queue: deque[_Piece] = deque()
        self._held = 0  # bytes in memory or requested
        self._demanded = start  # the newest step that a thread waits for
        self._closed = False
        self._failure: BaseException | None = None
        for work in (self._plan, *[self._fetch] * _REQUESTS):
            threading.Thread(target=self._guarded, args=(work,), daemon=True).start()

    def run(self, step: int, stream: int) -> Run:
        """Return the records of one stream in a batch."""
        return self._order.at(stream, step * self._width, self._width)

    def take(self, step: int, record: int, key: _Key) -> AnyRecord:
        """Wait for a record, which can be taken once an epoch. Raises SampleError if it is bad."""
        with self._lock:
            if step > self._demanded:
                self._demanded = step
                self._room.notify()
            while (piece := self._pieces.get(key)) is None or piece.records is None:
                if self._failure or self._closed:
                    raise self._failure or InterruptedError("the reader of blocks was closed")
                self._arrived.wait()
            fetched = piece.records[record - key[1]]
            assert fetched is not None, (record, key)  # else the order has it twice
            self._give_up(piece, record - key[1])
            self._left[key] -= 1
            if not self._left[key]:
                del self._left[key], self._pieces[key]
                self._room.notify()
        if isinstance(fetched, SampleError):
            raise fetched
        return fetched

    def close(self) -> None:
        """Stop the threads, without waiting for pending requests."""
        with self._lock:
            self._closed = True
            for condition in (self._arrived, self._room, self._work):
                condition.notify_all()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:  # raised where a record is waited for
            with self._lock:
                self._failure = self._failure or error
                self._arrived.notify_all()

    def _give_up(self, piece: _Piece, offset: int) -> None:
        """Release a record."""
        assert piece.records is not None
        fetched, piece.records[offset] = piece.records[offset], None
        if isinstance(fetched, AnyRecord):
            piece.size -= fetched.size
            self._held -= fetched.size

    # -------------------------------------------------------------------------- background threads

    def _plan(self) -> None:
        """Queue pieces in the order in which they are needed, as far as the budget allows."""
        used = self._used_before()
        to_plan: dict[_Key, int] = {}  # records of begun pieces that no planned step has used
        step = self._start
        while True:
            for stream in self._streams:
                run = self.run(step, stream)
                places = zip(run.epoch.tolist(), run.first.tolist(), run.last.tolist(), strict=True)
                for epoch, first, last in places:
                    key = (epoch, first)
                    if key not in to_plan:
                        piece = self._begin(key, last, used.pop(key, set()))
                        to_plan[key] = piece.count - len(piece.used)
                        if not self._queued(piece, step, to_plan[key]):
                            return
                    to_plan[key] -= 1
                    if not to_plan[key]:
                        del to_plan[key]
            step += 1

    def _used_before(self) -> dict[_Key, set[int]]:
        """Return the used records of pieces that steps before the first have begun."""
        used: dict[_Key, set[int]] = {}
        for stream in self._streams:
            offset = self._start * self._width
            back = min(offset, self._order.reach(stream))
            if back:
                run = self._order.at(stream, offset - back, back)
                for record, epoch, first in zip(*(x.tolist() for x in run[:3]), strict=True):
                    used.setdefault((epoch, first), set()).add(record)
        return used

    def _begin(self, key: _Key, last: int, used: set[int]) -> _Piece:
        first = key[1]
        size = self._source.size(first, last) * (last - first - len(used)) // (last - first)
        return _Piece(key, last, used, size)

    def _queued(self, piece: _Piece, step: int, left: int) -> bool:
        """Queue a piece once memory is free or its step is waited for; False if closed."""
        with self._lock:
            while not self._closed and step > self._demanded:
                near = step <= self._demanded + self._ahead
                if near and self._held + piece.size <= self._budget:
                    break
                CLOCK.wait(self._room, _LOOK)
            self._held += piece.size
            self._left[piece.key] = left
            self._pieces[piece.key] = piece
            self._queue.append(piece)
            self._work.notify()
            return not self._closed

    def _fetch(self) -> None:
        while True:
            with self._lock:
                while not self._queue and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                piece = self._queue.popleft()
            first = piece.key[1]
            try:
                records: list[AnyRecord | SampleError | None] = [
                    *self._source.fetch(first, piece.last)
                ]
            except SampleError as error:
                records = [error] * piece.count
            with self._lock:
                size = sum(record.size for record in records if isinstance(record, AnyRecord))
                self._held += size - piece.size
                piece.size, piece.records = size, records
                for record in piece.used:
                    self._give_up(piece, record - first)
                self._arrived.notify_all()
