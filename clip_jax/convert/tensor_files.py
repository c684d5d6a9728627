"""Open files of named tensors: safetensors, in one file or sharded, PyTorch's and NumPy's.

Files are mapped into memory: a tensor is a view, whose values are read when it is used. The format
is recognised by content, not by name. Nothing needs torch and nothing is executed.
"""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from clip_jax.convert.settings import read_json
from clip_jax.errors import InputError
from clip_jax.storage.archives import is_npz, map_file, read_npz
from clip_jax.storage.torch_pickle import read_torch

Tensors = dict[str, np.ndarray]


_TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def read_tensors(path: Path) -> Tensors:
    """Return every tensor of a file, or of the shards that an `.index.json` names, as views of it.

    Raises InputError, which describes the file, if it is not one of tensors.
    """
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    buffer = map_file(path)
    head = bytes(buffer[:9])
    if head[8:9] == b"{":
        return _open_safetensors(path, buffer)
    if head[:2] == b"PK" and is_npz(buffer):
        return read_npz(buffer, str(path))
    if head[:2] == b"PK":
        return read_torch(buffer, str(path))
    if head[:2] == b"\x80\x02":
        raise InputError(
            f"{path} is a pickle without a zip archive, as PyTorch before 1.6 wrote it; load it "
            "with torch and save it again."
        )
    raise InputError(
        f"{path} is neither safetensors nor a PyTorch file nor an .npz: it begins with the bytes "
        f"{head.hex(' ')}."
    )


def _open_safetensors(path: Path, buffer: memoryview) -> Tensors:
    try:
        with safetensors.safe_open(path, "numpy"):  # checks the header and all offsets
            pass
        start = 8 + int.from_bytes(buffer[:8], "little")
        header = json.loads(bytes(buffer[8:start]))
        header.pop("__metadata__", None)
        tensors: Tensors = {}
        for name, entry in header.items():
            offset = start + entry["data_offsets"][0]
            tensors[name] = np.ndarray(entry["shape"], _TYPES[entry["dtype"]], buffer, offset)
        return tensors
    except KeyError as error:  # a type that NumPy lacks
        raise InputError(
            f"{path} holds tensors of type {error.args[0]}; float32, float16 and bfloat16 are "
            "supported. Save the weights in one of them, unquantized."
        ) from error
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise InputError(f"{path} is a damaged or truncated safetensors file: {error}.") from error


def _open_shards(path: Path) -> Tensors:
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise InputError(f"{path} lacks weight_map, which maps tensors to files.")
    tensors: Tensors = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or file == ".." or file.endswith(".json"):
            raise InputError(f"{path} names {file!r}, which is not a file beside it; add it.")
        tensors |= read_tensors(path.parent / file)
    if missing := sorted(set(places) - set(tensors)):
        raise InputError(f"the shards of {path} lack {len(missing)} tensors, first {missing[:10]}.")
    return tensors


def write_safetensors(path: Path, tensors: Tensors, metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file."""
    # safetensors writes an array's memory, ignoring its strides.
    contiguous = {name: np.array(x, order="C", ndmin=0) for name, x in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    safetensors.numpy.save_file(contiguous, path, metadata)
    path.chmod(mode)  # safetensors creates files that only their owner can read
