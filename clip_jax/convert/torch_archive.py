"""Zip containers as PyTorch writes them, mapped into memory and never unpacked.

Everything that is read lies in the file as it is: compressed, encrypted or overlapping entries are
refused, so nothing can grow beyond the file's own size.
"""

import itertools
import mmap
import struct
from pathlib import Path

from clip_jax.errors import InputError

_END = b"PK\x05\x06"
_END_64 = b"PK\x06\x06"
_LOCATOR_64 = b"PK\x06\x07"
_CENTRAL = b"PK\x01\x02"
_LOCAL = b"PK\x03\x04"
_MAX_ENTRIES = 200_000  # a checkpoint with its optimizer has a few thousand
_FULL_32 = 0xFFFFFFFF  # "see the zip64 field"


def map_file(path: Path) -> memoryview:
    """Map a file read-only. Raises InputError, which says what it is instead of a file."""
    if path.is_dir():
        raise InputError(f"{path} is a directory; a file is needed.")
    if not path.is_file():  # opening a pipe would wait for ever
        pipe = f"{path} is a pipe or a device; a regular file is needed."
        raise InputError(pipe if path.exists() else f"there is no file {path}.")
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise InputError(f"{path} is empty.")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_archive(buffer: memoryview, root: bool = True) -> dict[str, memoryview]:
    """Return entry name → its bytes in the file, with `root` without the archive's root folder.

    What lies under `code/` (TorchScript's program) is left out and may be compressed. Raises
    InputError, or struct.error where the file ends too early.
    """
    entries: dict[str, memoryview] = {}
    spans = []
    for entry, method, flags, packed, size, header in _central_directory(buffer):
        path = entry.partition("/")[2] if root else entry
        if path.startswith("code/") or entry.endswith("/"):
            continue
        if method or flags & 1:
            kind = "compressed" if method else "encrypted"
            raise InputError(
                f"entry {entry} is {kind}; PyTorch and numpy.savez store tensors as they are, so "
                "this archive was not written by them. Unpack it and save it with one of them."
            )
        start = _data_start(buffer, header, entry)
        if packed != size or start + size > len(buffer):
            raise InputError(
                f"entry {entry} claims {size} bytes at {start} of a file of {len(buffer)}; "
                "it is truncated or damaged."
            )
        if path in entries:
            raise InputError(f"two entries are called {entry}.")
        entries[path] = buffer[start : start + size]
        spans.append((header, start + size, entry))
    spans.sort()
    for (_, end, first), (start, _, second) in itertools.pairwise(spans):
        if start < end:
            raise InputError(f"entries {first} and {second} overlap; it is a zip bomb.")
    return entries


def _central_directory(buffer: memoryview) -> list[tuple[str, int, int, int, int, int]]:
    """List (name, method, flags, packed size, size, offset of the local header)."""
    tail = bytes(buffer[-(22 + 0xFFFF) :])
    end = tail.rfind(_END)
    if end < 0 or len(tail) - end < 22:
        raise InputError("a truncated zip archive: its directory is missing.")
    count, total, size, offset = struct.unpack_from("<HHII", tail, end + 8)
    end += len(buffer) - len(tail)
    if end >= 20 and buffer[end - 20 : end - 16] == _LOCATOR_64:
        (end_64,) = struct.unpack_from("<Q", buffer, end - 12)
        if buffer[end_64 : end_64 + 4] != _END_64:
            raise InputError("a damaged zip archive: its zip64 directory is missing.")
        count, total, size, offset = struct.unpack_from("<QQQQ", buffer, end_64 + 24)
    if count != total or count > _MAX_ENTRIES or offset + size > len(buffer):
        raise InputError(
            f"a damaged zip archive: {count} entries (at most {_MAX_ENTRIES}) in a "
            f"directory that ends at byte {offset + size} of {len(buffer)}."
        )
    entries = []
    at = offset
    for _ in range(count):
        if buffer[at : at + 4] != _CENTRAL:
            raise InputError(f"a damaged zip archive at byte {at}.")
        flags, method = struct.unpack_from("<HH", buffer, at + 8)
        packed, unpacked, names, extras, comments = struct.unpack_from("<IIHHH", buffer, at + 20)
        (header,) = struct.unpack_from("<I", buffer, at + 42)
        entry = bytes(buffer[at + 46 : at + 46 + names]).decode()
        extra = buffer[at + 46 + names : at + 46 + names + extras]
        unpacked, packed, header = _zip64(extra, unpacked, packed, header)
        entries.append((entry, method, flags, packed, unpacked, header))
        at += 46 + names + extras + comments
    return entries


def _zip64(extra: memoryview, *values: int) -> list[int]:
    """Replace the 32-bit fields that are full by the zip64 record's, in its order."""
    wide: list[int] = []
    at = 0
    while at + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            wide = list(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
        at += 4 + size
    return [wide.pop(0) if value == _FULL_32 and wide else value for value in values]


def _data_start(buffer: memoryview, header: int, entry: str) -> int:
    if buffer[header : header + 4] != _LOCAL:
        raise InputError(f"entry {entry} has no header at byte {header}; it is damaged.")
    names, extras = struct.unpack_from("<HH", buffer, header + 26)
    return header + 30 + names + extras
