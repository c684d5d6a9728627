"""Data sources, one module for each format: random access, a length, a key for each sample."""

import abc
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float64, Int64, UInt8

from clip_jax.errors import InputError
from clip_jax.parts import Part
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath


class SampleError(Exception):
    """One sample cannot be used; the message is the reason shown in `skipped.jsonl`."""


class SourceConfig(Part):
    """Base of the configs of sources, which `data.source` and the members of a mixture may be."""

    suffixes: ClassVar[tuple[str, ...]] = ()  # endings of files that a path alone stands for

    def open(self, image_size: int, process: tuple[int, int], /) -> "Source":
        """Open the source; one that draws its images does so at `image_size` pixels.

        `process` is (index, count) of this process. Raises InputError if there is no data.
        """
        raise NotImplementedError


@runtime_checkable
class Source(Protocol):
    """Image-text pairs by index. Implementations are thread-safe."""

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name one sample, the same in every run, so that a person finds it."""
        ...

    def load(
        self, index: int, rng: np.random.Generator
    ) -> tuple[bytes | UInt8[np.ndarray, "H W 3"], str]:
        """Load an encoded image (or pixels of the final size) and its caption.

        Everything random in a sample (which caption, how it is drawn) comes from `rng`. Raises
        SampleError if the sample cannot be read.
        """
        ...


class Record(NamedTuple):
    """One sample, ready to be loaded."""

    key: str
    size: int  # bytes
    load: Callable[[np.random.Generator], tuple[bytes | UInt8[np.ndarray, "H W 3"], str]]


class StoredRecord(NamedTuple):
    """One sample as it is stored; each part is decoded, or read, on demand."""

    key: str
    size: int  # bytes; 0 where nothing was read
    image: Callable[[], bytes]  # raises SampleError if there is none
    text: Callable[[], Any]  # argument of `captions_of`; raises SampleError
    more: Callable[[], Any] = lambda: None  # a Reinforcement, or None; raises SampleError
    label: int | None = None  # number of its class, among the source's `classes`

    def load(self, rng: np.random.Generator) -> tuple[bytes, str]:
        """Load the encoded image and a caption."""
        return self.image(), caption_of(self.text(), rng)

    def captions(self) -> list[str]:
        """Return all captions. Raises SampleError."""
        return captions_of(self.text())


AnyRecord = Record | StoredRecord


class StoredSource(abc.ABC):
    """A `Source` of encoded images with all their captions, as `clip-jax prepare` needs."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def key(self, index: int) -> str:
        """Name one sample, the same in every run, so that a person finds it."""

    @abc.abstractmethod
    def record(self, index: int) -> StoredRecord:
        """Return one sample as it is stored. Raises SampleError if it cannot be read."""

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        """Load the encoded image and a caption. Raises SampleError."""
        return self.record(index).load(rng)

    def image(self, index: int) -> bytes:
        """Return the encoded image. Raises SampleError."""
        return self.record(index).image()


@runtime_checkable
class BlockSource(Source, Protocol):
    """A source whose records are stored in blocks, so that one request reads many."""

    def blocks(self) -> Int64[np.ndarray, " blocks"]:
        """Return the number of records in each block, in the order of the records."""
        ...

    def size(self, first: int, last: int) -> int:
        """Return the bytes of the records from `first` to before `last`, all in one block."""
        ...

    def fetch(self, first: int, last: int) -> Sequence[AnyRecord]:
        """Read records of one block at once. Raises SampleError if none can be read."""
        ...


def blocks_of(source: Source) -> Int64[np.ndarray, " blocks"]:
    """Return a source's block sizes; without blocks, each record counts as one."""
    if isinstance(source, BlockSource):
        return source.blocks()
    return np.ones(len(source), np.int64)


def digest(source: Source, *, blocks: bool = False, keys: int = 100) -> str:
    """Hash what identifies a source: the number of samples, the keys of up to `keys` of them,
    evenly spread, and with `blocks` the sizes of its blocks."""
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
    """A source with numeric columns beside its pairs, such as a CLIP score."""

    def scores(self, column: str) -> Float64[np.ndarray, " N"]:
        """Return a column, with NaN for missing values. Raises InputError if there is no such
        column."""
        ...


def caption_of(value: Any, rng: np.random.Generator) -> str:
    """Return the text of a cell: a string, UTF-8 bytes, or a sequence, of which one is drawn.

    A single text draws nothing from `rng`, so that a sample is the same in every format.
    """
    values = _several(value)
    return text_of(values[0] if len(values) == 1 else values[int(rng.integers(len(values)))])


def captions_of(value: Any) -> list[str]:
    """Return all texts of a cell."""
    return [text_of(text) for text in _several(value)]


def _several(value: Any) -> Sequence[Any] | np.ndarray:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence | np.ndarray):
        return [value]
    if not len(value):
        raise SampleError("caption is missing: the list is empty")
    return value


def check_columns(path: str | AnyPath, config: Any, names: Sequence[str]) -> None:
    """Raise InputError unless `names` contains each of the config's columns exactly once."""
    for option in ("image_column", "caption_column"):
        if column := getattr(config, option):
            check_column(path, column, names, option)


def check_column(path: str | AnyPath, name: str, names: Sequence[str], option: str = "") -> None:
    """Raise InputError unless exactly one column has the name; `option` can change it."""
    if (count := names.count(name)) != 1:
        what = f"no column {name!r}, only" if not count else f"{count} columns {name!r} among"
        advice = f"; set {option} to one of them" if option else ""
        raise InputError(f"{path} has {what} {', '.join(map(repr, names)) or 'none'}{advice}")


def read_file(path: AnyPath, what: str) -> bytes:
    """Read a file. Raises SampleError if it is missing or not a regular file."""
    try:
        return files.read(path)
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise SampleError(f"{what}: {reason}: {str(path)!r:.300}") from error


def text_of(value: Any, name: str = "caption") -> str:
    """Return a string, or decode UTF-8 bytes. Raises SampleError for anything else."""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8-sig")
        if isinstance(value, str):
            value.encode()  # JSON may contain a lone surrogate, which UTF-8 cannot
            return value.removeprefix("\ufeff")  # byte order mark
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise SampleError(f"{name} is not UTF-8: {error.reason} at {error.start}") from error
    raise SampleError(f"{name} is {'missing' if value is None else type(value).__name__}")
