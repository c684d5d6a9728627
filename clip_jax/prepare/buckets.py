"""Files of buckets: one task sorts records by a key, and others read a range of each file.

It is the only format between stages: the offset of each bucket and the file's size (64 bits,
little-endian), then the buckets. Reading a range of buckets takes two requests, whatever the file's
size. A file that was cut is an error, since its records would be missing from the result.
"""

import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import UInt64

from clip_jax.errors import InputError
from clip_jax.storage import files
from clip_jax.storage.files import AnyPath

_OFFSET = struct.Struct("<Q")
_FRAME = struct.Struct("<QQI")  # order, index and length of the record that follows
ADVICE = "Delete it and run the same command again, which computes only missing files."
_THREADS = 16  # for reading, which is mostly waiting if files are in a bucket

Framed = tuple[int, int, memoryview]  # order, index, record


def write(path: AnyPath, buckets: Sequence[bytes]) -> None:
    """Write all buckets atomically."""
    ends = np.cumsum([0, *map(len, buckets)], dtype="<u8") + _OFFSET.size * (len(buckets) + 1)
    files.write_whole(path, b"".join([ends.tobytes(), *buckets]))


def write_one(path: AnyPath, content: bytes) -> None:
    """Write a file of one bucket atomically."""
    write(path, [content])


def read(path: AnyPath, first: int, last: int) -> bytes:
    """Read the buckets from `first` to before `last`. Raises InputError if the file was cut."""
    name = str(path)
    ends = [(_OFFSET.size * number, _OFFSET.size) for number in (first, last)]
    offsets = b"".join(files.read_ranges(name, ends))
    if len(offsets) != 2 * _OFFSET.size:
        raise _damaged(path)
    (begin,), (end,) = _OFFSET.iter_unpack(offsets)
    if begin == end:
        return b""
    (data,) = files.read_ranges(name, [(begin, max(0, end - begin))])
    if len(data) != end - begin:
        raise _damaged(path)
    return data


def read_one(path: AnyPath) -> bytes:
    """Read the content of a file of one bucket. Raises InputError if the file was cut."""
    data = files.read(path)
    begin = 2 * _OFFSET.size
    if len(data) < begin or _OFFSET.unpack_from(data, _OFFSET.size) != (len(data),):
        raise _damaged(path)
    return data[begin:]


def _damaged(path: AnyPath) -> InputError:
    return InputError(f"{path} is damaged: its size differs from the recorded one. {ADVICE}")


def read_all(paths: Sequence[AnyPath], first: int, last: int) -> Iterator[bytes]:
    """Read the same range of buckets from many files, in their order."""
    with ThreadPoolExecutor(_THREADS) as threads:
        yield from threads.map(lambda path: read(path, first, last), paths)


def number_of(keys: UInt64[np.ndarray, " n"], count: int) -> UInt64[np.ndarray, " n"]:
    """Return the bucket, of `count` (a power of two), of each 64-bit key; the order is kept."""
    bits = count.bit_length() - 1
    return keys >> np.uint64(64 - bits) if bits else np.zeros_like(keys)


def power_of_two(least: float) -> int:
    """Return the smallest power of two that is at least `least`."""
    return 1 << max(0, int(np.ceil(np.log2(max(least, 1)))))


def frame(order: int, index: int, record: bytes) -> bytes:
    """Prefix a record with the keys that sort it."""
    return _FRAME.pack(order, index, len(record)) + record


def frames(data: bytes) -> Iterator[Framed]:
    """Yield the records of buckets."""
    at = 0
    view = memoryview(data)
    while at < len(data):
        order, index, size = _FRAME.unpack_from(data, at)
        at += _FRAME.size
        yield order, index, view[at : at + size]
        at += size
