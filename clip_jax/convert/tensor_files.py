"""Read files of named tensors: safetensors, in one file or sharded, PyTorch's and NumPy's.

The format is recognised by content, not by name. Nothing needs torch and nothing is executed.
"""

from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from clip_jax.convert.settings import read_json
from clip_jax.errors import InputError
from clip_jax.storage.archives import is_npz, map_file, read_npz
from clip_jax.storage.torch_pickle import read_torch

Tensors = dict[str, np.ndarray]


def read_tensors(path: Path) -> Tensors:
    """Read every tensor of a file, or of the shards that an `.index.json` names.

    Raises InputError, which describes the file, if it is not one of tensors.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    buffer = map_file(path)
    head = bytes(buffer[:9])
    if head[8:9] == b"{":
        return _read_safetensors(path)
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


def _read_safetensors(path: Path) -> Tensors:
    try:
        return safetensors.numpy.load_file(path)
    except (AttributeError, KeyError) as error:  # a type that NumPy lacks
        kind = str(error.args[0]).rpartition("attribute ")[2].strip("'")
        raise InputError(
            f"{path} holds tensors of type {kind}; float32, float16 and bfloat16 are supported. "
            "Save the weights in one of them, unquantized."
        ) from error
    except (safetensors.SafetensorError, OSError, TypeError) as error:
        raise InputError(f"{path} is a damaged or truncated safetensors file: {error}.") from error


def _read_shards(path: Path) -> Tensors:
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
