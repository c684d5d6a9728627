"""Read zip archives of PyTorch and NumPy by memory-mapping, without unpacking.

Compressed, encrypted or overlapping entries are errors, so nothing can grow beyond the size of the
file.
"""

import io
import math
import mmap
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from clip_jax.errors import InputError

_HEADER = 30  # bytes of an entry's header, before its name
_SUFFIX = ".npy"
_BFLOAT16 = np.dtype("V2")  # bfloat16 in NumPy's format, which has no name for it
_LONGEST_HEADER = 10_000  # bytes; NumPy's limit


def map_file(path: Path) -> memoryview:
    """Map a file read-only. Raises InputError, which says what the path is instead."""
    if path.is_dir():
        raise InputError(f"{path} is a directory; a file is needed.")
    if not path.is_file():  # opening a pipe would block
        pipe = f"{path} is a pipe or a device; a regular file is needed."
        raise InputError(pipe if path.exists() else f"there is no file {path}.")
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise InputError(f"{path} is empty.")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def read_archive(buffer: memoryview, root: bool = True) -> dict[str, memoryview]:
    """Return entry name → its bytes in the file, with `root` without the archive's root folder.

    Entries below `code/` (TorchScript's program) are skipped and may be compressed. Raises
    InputError, or struct.error if the file ends too early.
    """
    entries: dict[str, memoryview] = {}
    for info in _directory(buffer):
        entry, header, size = info.orig_filename, info.header_offset, info.file_size
        path = entry.partition("/")[2] if root else entry
        if path.startswith("code/") or entry.endswith("/"):
            continue
        if info.compress_type or info.flag_bits & 1:
            kind = "compressed" if info.compress_type else "encrypted"
            raise InputError(
                f"entry {entry} is {kind}, so neither PyTorch nor numpy.savez wrote the archive. "
                "Load its tensors and save them again with one of these."
            )
        if buffer[header : header + 4] != b"PK\x03\x04":
            raise InputError(
                f"entry {entry} has no header at byte {header}: the archive is damaged."
            )
        start = header + _HEADER + sum(struct.unpack_from("<HH", buffer, header + 26))
        if info.compress_size != size or start + size > len(buffer):
            raise InputError(
                f"entry {entry} claims {size} bytes at {start} of a file of {len(buffer)}; "
                "the archive is truncated or damaged."
            )
        if path in entries:
            raise InputError(f"two entries are called {entry}: the archive is damaged.")
        entries[path] = buffer[start : start + size]
    if sum(map(len, entries.values())) > len(buffer):
        raise InputError("the entries overlap, and together are longer than the file.")
    return entries


def _directory(buffer: memoryview) -> list[zipfile.ZipInfo]:
    mapped = buffer.obj
    file = mapped if isinstance(mapped, mmap.mmap) else io.BytesIO(buffer)
    try:
        with zipfile.ZipFile(file) as archive:  # ty: ignore[no-matching-overload]
            return archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise InputError(f"truncated or damaged zip archive: {error}.") from error


def is_npz(buffer: memoryview) -> bool:
    """Return whether an archive's first entry is an array."""
    length = int.from_bytes(buffer[26:28], "little")
    return bytes(buffer[30 : 30 + length]).endswith(_SUFFIX.encode())


def read_npz(buffer: memoryview, source: str) -> dict[str, np.ndarray]:
    """Return name → array, views of the file. Raises InputError, which names a bad entry."""
    try:
        entries = read_archive(buffer, root=False)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    except (ValueError, OverflowError, struct.error) as error:
        raise InputError(f"{source} is a damaged zip archive: {error}.") from error
    return {
        name.removesuffix(_SUFFIX): _array(data, f"{source}: entry {name}")
        for name, data in entries.items()
    }


def _array(data: memoryview, where: str) -> np.ndarray:
    head = io.BytesIO(bytes(data[: _LONGEST_HEADER + 16]))
    try:
        version = np.lib.format.read_magic(head)
        read = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read = np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(head, max_header_size=_LONGEST_HEADER)
    except Exception as error:  # NumPy parses a header as Python: of a damaged one, any error
        raise InputError(f"{where} is not an array: {error!s:.200}.") from error
    if dtype.hasobject or dtype.kind not in "fiubV" or (dtype.kind == "V" and dtype != _BFLOAT16):
        raise InputError(f"{where} holds values of type {dtype}; only numbers are supported.")
    values = data[head.tell() :]
    wrong = InputError(f"{where} claims {dtype}{list(shape)} but has {len(values)} bytes.")
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(values):
        raise wrong
    array = np.frombuffer(values, ml_dtypes.bfloat16 if dtype == _BFLOAT16 else dtype)
    try:
        return array.reshape(shape, order="F" if fortran else "C")
    except (TypeError, ValueError) as error:  # too many axes, or sizes that are no integers
        raise wrong from error


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays by `numpy.savez`, which has no bfloat16."""
    plain: dict[str, Any] = {
        name: x.view(_BFLOAT16) if x.dtype == ml_dtypes.bfloat16 else x
        for name, x in arrays.items()
    }
    with path.open("wb") as file:
        np.savez(file, **plain)
