"""NumPy's `.npz`: arrays in a zip archive, mapped into memory and never unpacked or unpickled."""

import io
import math
import struct
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np

from clip_jax.convert.torch_archive import read_archive
from clip_jax.errors import InputError

_SUFFIX = ".npy"
_BFLOAT16 = np.dtype("V2")  # as NumPy's format has it, which knows no name for it
_LONGEST_HEADER = 10_000  # bytes, as NumPy's own limit


def is_npz(buffer: memoryview) -> bool:
    """Say whether an archive's first entry is an array."""
    length = int.from_bytes(buffer[26:28], "little")
    return bytes(buffer[30 : 30 + length]).endswith(_SUFFIX.encode())


def read_npz(buffer: memoryview, source: str) -> dict[str, np.ndarray]:
    """Return name → array, each a view of the file. InputError names the entry that is wrong."""
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
    except ValueError as error:
        raise InputError(f"{where} is no array: {error!s:.200}.") from error
    if dtype.hasobject or dtype.kind not in "fiubV" or (dtype.kind == "V" and dtype != _BFLOAT16):
        raise InputError(f"{where} holds values of type {dtype}; numbers are read.")
    values = data[head.tell() :]
    if any(size < 0 for size in shape) or math.prod(shape) * dtype.itemsize != len(values):
        raise InputError(f"{where} claims {dtype}{list(shape)} and has {len(values)} bytes.")
    array = np.frombuffer(values, ml_dtypes.bfloat16 if dtype == _BFLOAT16 else dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays as `numpy.savez` does."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            plain = np.asarray(array, order="C")
            plain = plain.view(_BFLOAT16) if plain.dtype == ml_dtypes.bfloat16 else plain
            with archive.open(f"{name}{_SUFFIX}", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, plain, allow_pickle=False)
