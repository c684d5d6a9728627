"""One file a format: random access, a length, a key for each sample."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8


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


def caption_of(value: Any, rng: np.random.Generator) -> str:
    """Text of a cell: a string, UTF-8 bytes, or a sequence of them, of which one is drawn.

    A single text draws nothing, so that a sample looks the same in every format.
    """
    if isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes):
        if not len(value):
            raise SampleError("caption is missing: the list is empty")
        value = value[0] if len(value) == 1 else value[int(rng.integers(len(value)))]
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise SampleError(f"caption is not UTF-8: {error.reason} at {error.start}") from error
    if not isinstance(value, str):
        raise SampleError(f"caption is {'missing' if value is None else type(value).__name__}")
    return value
