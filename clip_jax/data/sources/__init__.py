"""One file a format: random access, a length, a key for each sample."""

from typing import Protocol, runtime_checkable

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
