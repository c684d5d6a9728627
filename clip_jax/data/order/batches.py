"""Batches assembled from pieces, each made by one thread.

In the global order a piece is a few dozen samples. In the block order it is one stream's rows of
the batch; a worker process has entire streams, so it alone reads their blocks.
"""

import functools
import operator
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int32, Int64

from clip_jax.clock import CLOCK
from clip_jax.data.batch_plan import BatchKind, BatchPlan
from clip_jax.data.order.blocks import StreamOrder, Streams
from clip_jax.data.order.read_ahead import ReadAhead
from clip_jax.data.sources import AnyRecord, SampleError, Source
from clip_jax.models.images import Images, concatenate
from clip_jax.storage import bucket

_PIECE = (8, 64)  # smallest and largest number of samples in a piece of a batch


@dataclass(frozen=True)
class Reading:
    """Requests to buckets, and how long threads waited for them."""

    requests: int = 0
    bytes_read: int = 0
    bytes_used: int = 0
    seconds_waited: float = 0.0

    def __add__(self, other: "Reading") -> "Reading":
        return Reading(*map(operator.add, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Batch:
    """This process's rows of one global batch."""

    image: Images | Float32[np.ndarray, "B E"]  # or stored embeddings of the images
    text: Int32[np.ndarray, "B L"] | Float32[np.ndarray, "B E"]  # or stored embeddings
    index: Int64[np.ndarray, " B"]  # global positions
    keys: list[str]  # of the samples used
    skipped: list[dict[str, Any]]  # position, key and reason of each bad sample
    first: int = 0  # position of the global batch's first pair
    inputs: dict[str, Any] = field(default_factory=dict)  # further arrays [B, ...], by name
    reading: Reading = field(default_factory=Reading, compare=False)  # since the previous batch

    @property
    def arrays(self) -> dict[str, Any]:
        """All arrays by name, as `Program.put` takes them; `row` is the row in the global batch."""
        row = self.index - self.first
        return {"image": self.image, "text": self.text, "row": row, **self.inputs}


@dataclass(frozen=True)
class Sample:
    """One sample of a batch."""

    arrays: dict[str, Any]  # the image and further inputs by name, each a batch of one
    captions: dict[str, str | list[str]]  # one or several, by the name of the input
    position: int
    key: str
    skipped: list[dict[str, Any]]


@runtime_checkable
class Load(Protocol):
    """Loads the sample of a position from the record that the order assigns to it."""

    source: Source

    def __call__(
        self,
        position: int,
        record: int,
        kind: BatchKind,
        fetched: AnyRecord | SampleError | None = None,
    ) -> Sample: ...


# Texts to token ids, by the name of the input.
Tokenizers = Mapping[str, Callable[[Sequence[Any]], Int32[np.ndarray, "B *T L"]]]


@dataclass(frozen=True)
class _Notes:
    """What a worker reports about a piece besides its arrays, which use shared memory."""

    index: Int64[np.ndarray, " B"]
    keys: list[str]
    skipped: list[dict[str, Any]]
    reading: Reading


Piece = tuple[dict[str, Any], _Notes]
NoPiece = tuple[()]  # not None, which Grain would drop


def _piece(samples: Sequence[Sample], tokenizers: Tokenizers, reading: Reading) -> Piece:
    notes = _Notes(
        index=np.array([sample.position for sample in samples], np.int64),
        keys=[sample.key for sample in samples],
        skipped=[event for sample in samples for event in sample.skipped],
        reading=reading,
    )
    arrays = concatenate([sample.arrays for sample in samples])
    for name, tokenize in tokenizers.items():
        arrays[name] = tokenize([sample.captions[name] for sample in samples])
    return arrays, notes


def join(pieces: Iterable[Piece | NoPiece], first: int = 0) -> Batch:
    """Assemble a batch, whose first pair is at the position `first`, from its pieces."""
    parts, notes = zip(*filter(None, pieces), strict=True)
    arrays = concatenate(parts)  # copies even a single piece: its shared memory is reused
    return Batch(
        image=arrays.pop("image"),
        text=arrays.pop("text"),
        first=first,
        inputs=arrays,
        index=np.concatenate([note.index for note in notes]),
        keys=[key for note in notes for key in note.keys],
        skipped=[event for note in notes for event in note.skipped],
        reading=sum((note.reading for note in notes), Reading()),
    )


@dataclass(frozen=True)
class GlobalPieces:
    """Makes this process's rows in the global order, `number` pieces for each unit of a batch."""

    load: Load
    tokenizers: Tokenizers
    order: Any  # record of a position
    plan: BatchPlan
    process: tuple[int, int]

    @functools.cached_property
    def number(self) -> int:
        """Equal pieces of a few dozen samples in a unit; 1 if it cannot be divided so."""
        size = self.plan.unit // self.process[1]
        number = next(n for n in range(-(-size // _PIECE[1]), size + 1) if size % n == 0)
        return number if size // number >= _PIECE[0] else 1

    def __call__(self, i: int) -> Piece:
        unit, piece = divmod(i, self.number)
        step, index, kind = self.plan.locate(unit)
        size = self.plan.unit // self.process[1] // self.number
        # A process has consecutive rows of the batch, so rows do not depend on their number.
        first = self.plan.samples_after(step) + self.process[0] * (kind.pairs // self.process[1])
        first += (index * self.number + piece) * size
        samples = [self.load(at, int(self.order[at]), kind) for at in range(first, first + size)]
        return _piece(samples, self.tokenizers, Reading(*bucket.requested()))

    def close(self) -> None:
        """Do nothing, since nothing is read ahead."""


@dataclass(frozen=True)
class StreamPieces:
    """Makes this process's rows in the block order, a piece for each stream of a unit. Empty pieces
    pad a unit, so that workers, which take pieces in turn, get the same streams in every unit."""

    load: Load
    tokenizers: Tokenizers
    make_order: Callable[[Source], StreamOrder]
    streams: Streams  # of a unit
    plan: BatchPlan
    workers: int
    start: int  # unit
    budget: int  # bytes read ahead
    _ahead: "_Opened" = field(default_factory=lambda: _Opened())

    @property
    def number(self) -> int:
        """Pieces in a unit, the empty ones included."""
        return -(-len(self.streams.of_process) // self.workers) * self.workers

    def __call__(self, i: int) -> Piece | NoPiece:
        unit, slot = divmod(i, self.number)
        streams = self.streams.of_process
        if slot >= len(streams):
            return ()
        ahead = self._ahead.get(lambda: self._open(streams[i % self.workers :: self.workers]))
        stream = streams[slot]
        width = self.streams.width
        first = unit * self.streams.batch_size + stream * width
        run = ahead.run(unit, stream)
        _, _, kind = self.plan.locate(unit)
        samples = []
        used = 0
        waited = 0.0
        for at, record, epoch, piece in zip(range(first, first + width), *run[:3], strict=True):
            start = CLOCK.now()
            try:
                fetched = ahead.take(unit, int(record), (int(epoch), int(piece)))
                used += fetched.size
            except SampleError as error:
                fetched = error
            waited += CLOCK.now() - start
            samples.append(self.load(at, int(record), kind, fetched))
        return _piece(samples, self.tokenizers, Reading(*bucket.requested(), used, waited))

    def _open(self, streams: Sequence[int]) -> ReadAhead:
        source: Any = self.load.source
        return ReadAhead(
            source,
            self.make_order(source),
            streams,
            width=self.streams.width,
            start=self.start,
            budget=self.budget // self.workers,
        )

    def close(self) -> None:
        """Stop reading ahead in this process."""
        self._ahead.close()


class _Opened:
    """The open reader of one process; a pickled copy has none."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ahead: ReadAhead | None = None

    def __reduce__(self) -> Any:
        return _Opened, ()

    def get(self, make: Callable[[], ReadAhead]) -> ReadAhead:
        with self._lock:
            if self._ahead is None:
                self._ahead = make()
            return self._ahead

    def close(self) -> None:
        with self._lock:
            if self._ahead is not None:
                self._ahead.close()
