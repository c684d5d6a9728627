"""One file a format: random access, a length, a key for each sample."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, UInt8


class SampleError(Exception):
    """This one sample cannot be used; the message is the reason that `skipped.jsonl` shows."""


@runtime_checkable
class Source(Protocol):
    """Image-text pairs by index. Threads share it."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name one sample, the same in every run, so that a person finds it."""
        ...

    def load(
        self, index: int, rng: np.random.Generator
    ) -> tuple[bytes | UInt8[np.ndarray, "H W 3"], str]:
        """Get an encoded image (or pixels of the final size) and its caption.

        What is random in a sample (which caption, how it is drawn) comes from `rng` alone. Raises
        SampleError if the sample cannot be read.
        """
        ...


@runtime_checkable
class StoredSource(Source, Protocol):
    """A source of files' bytes, with all captions of an image: what `clip-jax prepare` copies."""

    def image(self, index: int) -> bytes:
        """Get the encoded image. Raises SampleError."""
        ...

    def captions(self, index: int) -> list[str]:
        """Get all captions. Raises SampleError."""
        ...


@runtime_checkable
class ScoredSource(Protocol):
    """A source with numbers beside its pairs, such as a CLIP score."""

    def scores(self, column: str) -> Float64[np.ndarray, " N"]:
        """Get a column, NaN where a value is missing. ValueError if there is no such column."""
        ...


def caption_of(value: Any, rng: np.random.Generator) -> str:
    """Text of a cell: a string, UTF-8 bytes, or a sequence of them, of which one is drawn.

    A single text draws nothing, so that a sample looks the same in every format.
    """
    values = _several(value)
    return _text(values[0] if len(values) == 1 else values[int(rng.integers(len(values)))])


def captions_of(value: Any) -> list[str]:
    """All texts of a cell."""
    return [_text(one) for one in _several(value)]


def _several(value: Any) -> Sequence[Any] | np.ndarray:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        return [value]
    if not len(value):
        raise SampleError("caption is missing: the list is empty")
    return value


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise SampleError(f"caption is not UTF-8: {error.reason} at {error.start}") from error
    if not isinstance(value, str):
        raise SampleError(f"caption is {'missing' if value is None else type(value).__name__}")
    return value
