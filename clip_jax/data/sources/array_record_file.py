"""Read records of an ArrayRecord file by ranges of bytes, from a disk or a bucket.

It is a Riegeli file: blocks of 64 KiB, each with a header, across which one chunk of records
follows another. The last block has a chunk with the position of the chunk before it. That one is
the index: the position and the number of records of every chunk (google/riegeli,
doc/riegeli_records_file_format.md; google/array_record, cpp/layout.proto). Sizes and counts are
checked against each other; hashes are not, and transposed chunks are not supported.
"""

import functools
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from clip_jax.storage import files

_BLOCK = 1 << 16  # bytes
_BLOCK_HEADER = 24  # bytes: a hash, and the distances to both ends of the chunk that continues
_CHUNK = struct.Struct("<8xQ8xQQ")  # between hashes: size of the data; kind and records; decoded
_SIMPLE = ord("r")
_CODECS = {ord("b"): "brotli", ord("z"): "zstd", ord("s"): "snappy"}
_MAGIC = 0x71930E704FDAE05E
_LAST = 1 << 10  # used bytes of the last block
_TAIL = 1 << 17  # bytes before the last block, which contain the index of most files
_MOST = 1 << 30  # maximum bytes of a decoded chunk
_LONGEST = 9  # maximum bytes of a number of 63 bits
_OPEN = 256  # files whose index is cached


class ArrayRecordFile:
    """Records by number; neighbouring ones in one request. Threads share it.

    Raises ValueError if the file is damaged or not an ArrayRecord, besides errors of reading.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        size = files.stat(path)[0]
        if size < 2 * _BLOCK or size % _BLOCK:
            raise ValueError(f"{size:,} bytes, not two or more blocks of 64 KiB: it is incomplete")
        self._last = size - _BLOCK
        begin = max(0, self._last - _TAIL)
        tail = _read(path, begin, self._last + _LAST)
        footer = _fields(_records(tail[self._last - begin :], self._last)[0])
        if footer.get(2) != _MAGIC or not 0 < footer.get(1, 0) < self._last:
            raise ValueError("its last block does not end an ArrayRecord")
        self.end = footer[1]  # of the last record
        if self.end < begin:
            begin, tail = self.end, _read(path, self.end, self._last)
        header, *entries = _records(tail[self.end - begin : self._last - begin], self.end)
        about = _fields(_fields(header)[1])
        self._count = about.get(3, 0)
        self.transposed = b"transpose:true" in about.get(4, b"")
        # Records of a chunk; the last one may have fewer.
        self.group = int(_numbers(entries[0])[5]) if entries else 1

    def __len__(self) -> int:
        return self._count

    def read(self, first: int, last: int) -> Sequence[bytes]:
        """Read the records from `first` to before `last`, in one request."""
        begins, firsts = _index(self.path, self.end, self._last, self._count)
        chunks = range(
            int(np.searchsorted(firsts, first, "right")) - 1, int(np.searchsorted(firsts, last))
        )
        begin = int(begins[chunks.start])
        data = _read(self.path, begin, int(begins[chunks.stop]))
        wanted: list[bytes] = []
        for chunk in chunks:
            start, stop = begins[chunk : chunk + 2].tolist()
            records = _records(data[start - begin : stop - begin], start)
            if len(records) != firsts[chunk + 1] - firsts[chunk]:
                raise ValueError(f"the chunk at byte {start:,} and the index disagree")
            wanted += records
        skipped = first - int(firsts[chunks.start])
        return wanted[skipped : skipped + last - first]


@functools.lru_cache(maxsize=_OPEN)
def _index(
    path: str, begin: int, end: int, count: int
) -> tuple[Int64[np.ndarray, " edges"], Int64[np.ndarray, " edges"]]:
    """Return the bytes and records before each chunk, and before the end of the last one."""
    _, *entries = _records(_read(path, begin, end), begin)
    numbers = _numbers(b"".join(entries))
    if len(numbers) % 6 or (numbers.reshape(-1, 6)[:, ::2] != (0x08, 0x10, 0x18)).any():
        raise ValueError("its index has other fields than position, size and number of records")
    begins, _, counts = numbers.reshape(-1, 6)[:, 1::2].T
    edges, firsts = np.append(begins, begin), np.cumsum([0, *counts])
    if (np.diff(edges) <= 0).any() or (counts <= 0).any() or firsts[-1] != count:
        raise ValueError("its index is inconsistent")
    return edges, firsts


# ------------------------------------------------------------------------------------- the format


def _read(path: str, begin: int, end: int) -> bytes:
    (data,) = files.read_ranges(path, [(begin, end - begin)])
    if len(data) != end - begin:
        raise ValueError(f"it ends at byte {begin + len(data):,}: it changed while it was read")
    return data


def _records(data: bytes, begin: int) -> list[bytes]:
    """Decode the chunk at the start of these bytes, which are at `begin` in the file."""
    data = _without_headers(data, begin)
    if len(data) < _CHUNK.size:
        raise ValueError(f"no chunk at byte {begin:,}")
    size, kind_and_count, decoded = _CHUNK.unpack_from(data)
    kind, count = kind_and_count & 0xFF, kind_and_count >> 8
    data = data[_CHUNK.size : _CHUNK.size + size]
    if kind != _SIMPLE:
        raise ValueError(f"the chunk at byte {begin:,} is of kind {chr(kind)!r}, not 'r'")
    if len(data) != size or size < 2 or decoded > _MOST:
        raise ValueError(f"the chunk at byte {begin:,} has {size:,} bytes, decoded {decoded:,}")
    length, start = _number(data, 1)
    sizes = _numbers(_decompressed(data[0], data[start : start + length], _LONGEST * count))
    values = _decompressed(data[0], data[start + length :], decoded)
    ends = np.cumsum(sizes)
    if len(sizes) != count or len(values) != decoded or (count and ends[-1] != decoded):
        raise ValueError(f"the sizes in the chunk at byte {begin:,} are inconsistent")
    starts = (ends - sizes).tolist()
    return [values[start:end] for start, end in zip(starts, ends.tolist(), strict=True)]


def _without_headers(data: bytes, begin: int) -> bytes:
    """Drop the block headers from bytes that are at `begin` in a file."""
    edges = range(-(begin % _BLOCK), len(data), _BLOCK)
    return b"".join(data[max(edge + _BLOCK_HEADER, 0) : edge + _BLOCK] for edge in edges)


def _decompressed(codec: int, data: bytes, most: int) -> bytes:
    if not codec:
        return data
    if codec not in _CODECS:
        raise ValueError(f"compressed by {chr(codec)!r}, which is none of {list(_CODECS.values())}")
    size, start = _number(data, 0)
    if size > most:
        raise ValueError(f"a value has {size:,} bytes, more than the maximum of {most:,}")
    # pyarrow's ArrowInvalid is a ValueError, its ArrowIOError an OSError.
    return pa.decompress(data[start:], size, _CODECS[codec], asbytes=True)


def _number(data: bytes, at: int) -> tuple[int, int]:
    """Decode one number (a varint); return it and the offset after it."""
    value = 0
    for shift, byte in enumerate(data[at : at + _LONGEST]):
        value |= (byte & 0x7F) << 7 * shift
        if byte < 0x80:
            return value, at + shift + 1
    raise ValueError("a number is incomplete")


def _numbers(data: bytes) -> Int64[np.ndarray, " numbers"]:
    """Decode consecutive varints: seven bits in a byte, whose highest bit marks continuation."""
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1]).astype(np.int64)[: len(ends)]
    lengths = ends + 1 - starts
    if (len(array) and (not len(ends) or ends[-1] + 1 != len(array))) or (lengths > _LONGEST).any():
        raise ValueError("a number is incomplete")
    values = np.zeros(len(ends), np.int64)
    for shift in range(int(lengths.max(initial=0))):
        here = lengths > shift
        values[here] |= (array[starts[here] + shift] & 0x7F).astype(np.int64) << 7 * shift
    return values


def _fields(message: bytes) -> dict[int, Any]:
    """Decode a protocol buffer's numbers and bytes by field."""
    fields, at = {}, 0
    while at < len(message):
        tag, at = _number(message, at)
        value, at = _number(message, at)
        if tag & 7 == 2:
            value, at = message[at : at + value], at + value
        elif tag & 7:
            raise ValueError(f"its index has a field of type {tag & 7}")
        fields[tag >> 3] = value
    return fields
