"""One file a format: random access, a length, a key for each sample."""

import abc
import hashlib
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from clip_jax.errors import InputError
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath


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


class Record(NamedTuple):
    """One sample, ready to be loaded."""

    key: str
    size: int  # bytes
    load: Callable[[np.random.Generator], tuple[bytes | UInt8[np.ndarray, "H W 3"], str]]


class StoredRecord(NamedTuple):
    """One sample as it is stored; each part is decoded, or read, when it is asked for."""

    key: str
    size: int  # bytes; 0 where nothing was read
    image: Callable[[], bytes]  # SampleError where there is none
    text: Callable[[], Any]  # what `captions_of` takes. SampleError

    def load(self, rng: np.random.Generator) -> tuple[bytes, str]:
        """Get the encoded image and a caption."""
        return self.image(), caption_of(self.text(), rng)

    def captions(self) -> list[str]:
        """Get all captions. Raises SampleError."""
        return captions_of(self.text())


AnyRecord = Record | StoredRecord


class StoredSource(abc.ABC):
    """A `Source` of encoded images with all their captions: what `clip-jax prepare` copies."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def key(self, index: int) -> str:
        """Name one sample, the same in every run, so that a person finds it."""

    @abc.abstractmethod
    def record(self, index: int) -> StoredRecord:
        """Get one sample as it is stored. Raises SampleError if it cannot be read."""

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        """Get the encoded image and a caption. Raises SampleError."""
        return self.record(index).load(rng)

    def image(self, index: int) -> bytes:
        """Get the encoded image. Raises SampleError."""
        return self.record(index).image()


@runtime_checkable
class BlockSource(Source, Protocol):
    """A source whose records are stored in blocks, so that one request reads many."""

    def blocks(self) -> Int64[np.ndarray, " blocks"]:
        """How many records each block holds, in the order of the records."""
        ...

    def size(self, first: int, last: int) -> int:
        """Bytes of the records from `first` to before `last`, which are of one block."""
        ...

    def fetch(self, first: int, last: int) -> Sequence[AnyRecord]:
        """Read records of one block in one go. Raises SampleError where none can be read."""
        ...


def blocks_of(source: Source) -> Int64[np.ndarray, " blocks"]:
    """A source's blocks; each record is one where they lie apart."""
    if isinstance(source, BlockSource):
        return source.blocks()
    return np.ones(len(source), np.int64)


def digest(source: Source, *, blocks: bool = False, keys: int = 100) -> str:
    """Hash what tells a source from others: how many samples it has, the keys of up to `keys` of
    them, evenly spread, and the `blocks` in which they are read."""
    count = len(source)
    indices = sorted({i * count // keys for i in range(keys)}) if count > keys else range(count)
    hashed = hashlib.sha256(str(count).encode())
    for index in indices:
        hashed.update(b"\n" + source.key(index).encode("utf-8", "replace"))
    if blocks:
        hashed.update(blocks_of(source).tobytes())
    return hashed.hexdigest()[:12]


@runtime_checkable
class ScoredSource(Protocol):
    """A source with numbers beside its pairs, such as a CLIP score."""

    def scores(self, column: str) -> Float64[np.ndarray, " N"]:
        """Get a column, NaN where a value is missing. Raises InputError if there is no such
        column."""
        ...


def caption_of(value: Any, rng: np.random.Generator) -> str:
    """Text of a cell: a string, UTF-8 bytes, or a sequence of them, of which one is drawn.

    A single text draws nothing, so that a sample looks the same in every format.
    """
    values = _several(value)
    return text_of(values[0] if len(values) == 1 else values[int(rng.integers(len(values)))])


def captions_of(value: Any) -> list[str]:
    """All texts of a cell."""
    return [text_of(one) for one in _several(value)]


def _several(value: Any) -> Sequence[Any] | np.ndarray:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        return [value]
    if not len(value):
        raise SampleError("caption is missing: the list is empty")
    return value


def check_columns(path: str | AnyPath, config: Any, names: Sequence[str]) -> None:
    """Raise InputError unless `names` has the config's columns of images and captions once each."""
    for option in ("image_column", "caption_column"):
        if column := getattr(config, option):
            check_column(path, column, names, option)


def check_column(path: str | AnyPath, name: str, names: Sequence[str], option: str = "") -> None:
    """Raise InputError unless exactly one column has the name; `option` gives another."""
    if (count := names.count(name)) != 1:
        what = f"no column {name!r}, only" if not count else f"{count} columns {name!r} among"
        advice = f"; set {option}" if option else ""
        raise InputError(f"{path} has {what} {', '.join(map(repr, names)) or 'none'}{advice}")


def read_file(path: AnyPath, what: str) -> bytes:
    """Read a whole file. SampleError for one that is not there, and for what never ends."""
    try:
        if not files.is_remote(path):
            kind = os.stat(path).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise SampleError(f"{what}: a pipe or a device, not a file: {str(path)!r:.300}")
        return files.read(path)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise SampleError(f"{what}: {reason}: {str(path)!r:.300}") from error


def text_of(value: Any, name: str = "caption") -> str:
    """A string, or UTF-8 bytes as one. SampleError for what is neither."""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8-sig")
        if isinstance(value, str):
            value.encode()  # a JSON may hold half a letter, which nobody can write down
            return value.removeprefix("\ufeff")  # a mark of byte order is no letter
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise SampleError(f"{name} is not UTF-8: {error.reason} at {error.start}") from error
    raise SampleError(f"{name} is {'missing' if value is None else type(value).__name__}")
