"""Files of buckets: what one task sorts by a key, for others to take a range of it from each file.

The shuffle's only format: where each bucket begins (64 bits, little-endian), then the buckets. A
range of buckets costs two requests, whatever the file's size.
"""

import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt64

from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

_OFFSET = struct.Struct("<Q")
_FRAME = struct.Struct("<QQI")  # order, index, length of the record that follows
_THREADS = 16  # that read: in a bucket, most of the time is waiting

Framed = tuple[int, int, memoryview]  # order, index, record


def write(path: AnyPath, buckets: Sequence[bytes]) -> None:
    """Write all buckets, whole or not at all."""
    ends = np.cumsum([0, *map(len, buckets)], dtype="<u8") + _OFFSET.size * (len(buckets) + 1)
    files.write_whole(path, b"".join([ends.tobytes(), *buckets]))


def read(path: AnyPath, first: int, last: int) -> bytes:
    """Read the buckets from `first` to before `last`."""
    name = str(path)
    ends = [(_OFFSET.size * number, _OFFSET.size) for number in (first, last)]
    begin, end = (_OFFSET.unpack(data)[0] for data in files.read_ranges(name, ends))
    if begin == end:
        return b""
    (data,) = files.read_ranges(name, [(begin, end - begin)])
    return data


def read_all(paths: Sequence[AnyPath], first: int, last: int) -> Iterator[bytes]:
    """Read the same range of many files, in their order."""
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(lambda path: read(path, first, last), paths)


def number_of(keys: UInt64[np.ndarray, " n"], count: int) -> UInt64[np.ndarray, " n"]:
    """Which of `count` buckets, a power of two, a key of 64 bits falls into; they lie in order."""
    bits = count.bit_length() - 1
    return keys >> np.uint64(64 - bits) if bits else np.zeros_like(keys)


def power_of_two(least: float) -> int:
    """The smallest power of two that is at least so large."""
    return 1 << max(0, int(np.ceil(np.log2(max(least, 1)))))


def frame(order: int, index: int, record: bytes) -> bytes:
    """A record of a bucket, with what sorts it."""
    return _FRAME.pack(order, index, len(record)) + record


def frames(data: bytes) -> Iterator[Framed]:
    """The records of buckets."""
    at, view = 0, memoryview(data)
    while at < len(data):
        order, index, size = _FRAME.unpack_from(data, at)
        at += _FRAME.size
        yield order, index, view[at : at + size]
        at += size
