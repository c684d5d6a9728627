"""Read PyTorch's pickles as data: nothing in them is ever imported, called or executed.

Python's unpickler written in Python is restricted to the few opcodes that `torch.save` and
TorchScript write, and to replacements of the functions they call. It builds plain containers and
records of tensors; an object of a `__torch__` class keeps only its attributes. Any other opcode or
name is an error. Sizes, offsets and strides are checked against the file's storages before an array
is created, and arrays are views of the file.
"""

import io
import math
import pickle
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from clip_jax.errors import InputError
from clip_jax.storage.archives import read_archive

_MAX_PICKLE = 8 << 20  # bytes; that of a large checkpoint has one or two MB
_MAX_OBJECTS = 100_000  # a checkpoint has a few thousand tensors
_MAX_DEPTH = 64  # levels of nested modules
_MAX_NAME = 200  # characters
_MAX_DIMS = 16

_DTYPES: dict[str, Any] = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "ShortStorage": np.int16,
    "CharStorage": np.int8,
    "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}
_LISTS = ("build_intlist", "build_doublelist", "build_boollist", "build_tensorlist")


@dataclass
class Inert:
    """The attributes of an object of a class that TorchScript defined."""

    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle refers to; calling it has a harmless effect."""

    module: str
    name: str

    @property
    def is_script_class(self) -> bool:
        return self.module == "__torch__" or self.module.startswith("__torch__.")

    def __call__(self, *arguments: Any) -> Any:
        if self.is_script_class:
            return Inert()
        if (self.module, self.name) not in _MAKERS:
            raise InputError(f"its pickle calls {self.module}.{self.name}, which is not supported.")
        return _MAKERS[self.module, self.name](*arguments)


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch(buffer: memoryview, name: str) -> dict[str, np.ndarray]:
    """Read the tensors of a file that `torch.save` or `torch.jit.save` wrote, by name.

    Values that are not tensors are ignored; from a training checkpoint, `state_dict` is read.
    Raises InputError for a damaged file and for one of another kind.
    """
    try:
        return _read(buffer)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    # The opcodes of a hostile file may raise anything.
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        struct.error,
        pickle.UnpicklingError,
    ) as error:
        raise InputError(f"{name} is not a PyTorch file, or damaged: {error}.") from error


def _read(buffer: memoryview) -> dict[str, np.ndarray]:
    entries = read_archive(buffer)
    if "data.pkl" not in entries:
        raise InputError("it is a zip archive without data.pkl, so PyTorch did not write it.")
    if bytes(entries.get("byteorder", memoryview(b"little"))[:8]) != b"little":
        raise InputError("it is big-endian; only little-endian files are supported.")
    stream = io.BytesIO(entries["data.pkl"][:_MAX_PICKLE])
    try:
        content = _Reader(stream, encoding="latin-1").load()
    except EOFError as error:
        raise InputError(f"its pickle does not end within {_MAX_PICKLE} bytes.") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]  # the model, of a training checkpoint
    tensors = _find_tensors(content)
    if not tensors:
        raise InputError("it holds no tensors.")
    total = sum(math.prod(t.shape) * t.storage.dtype.itemsize for t in tensors.values())
    if total > len(buffer):
        raise InputError(
            f"it has {len(buffer)} bytes but claims {total} bytes of tensors: they share storage."
        )
    storages = {path[5:]: data for path, data in entries.items() if path.startswith("data/")}
    return {path: _view(tensor, storages, path) for path, tensor in tensors.items()}


def _find_tensors(content: Any) -> dict[str, _Tensor]:
    """Collect tensors by their path of attributes, within limits, since objects may be cyclic."""
    tensors: dict[str, _Tensor] = {}
    todo: list[tuple[str, Any, int]] = [("", content, 0)]
    seen = 0
    while todo:
        path, value, depth = todo.pop()
        seen += 1
        if isinstance(value, _Tensor):
            tensors[path] = value
        items = value.attributes if isinstance(value, Inert) else value
        if not isinstance(items, dict):
            continue
        if seen + len(todo) + len(items) > _MAX_OBJECTS or depth > _MAX_DEPTH:
            raise InputError("it has too many objects, or too deeply nested ones.")
        for key, child in items.items():
            if isinstance(key, str):
                if len(key) > _MAX_NAME:
                    raise InputError(
                        f"it has a name of {len(key)} characters, more than {_MAX_NAME}."
                    )
                todo.append((f"{path}.{key}" if path else key, child, depth + 1))
    return tensors


def _view(tensor: _Tensor, storages: dict[str, memoryview], path: str) -> np.ndarray:
    storage = tensor.storage
    what = f"tensor {path} of shape {list(tensor.shape)}"
    if storage.key not in storages:
        raise InputError(f"{what} is in storage {storage.key[:99]}, which the file lacks.")
    data = storages[storage.key]
    dtype = storage.dtype
    if storage.numel * dtype.itemsize != len(data):
        raise InputError(
            f"{what} is in storage {storage.key[:99]} of {storage.numel} {dtype.name} values, but "
            f"the file has {len(data)} bytes for it."
        )
    numel = math.prod(tensor.shape)
    last = tensor.offset + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.strides, strict=True)
    )
    if numel and (last >= storage.numel or numel > storage.numel):
        raise InputError(
            f"{what}, offset {tensor.offset} and strides {list(tensor.strides)} exceeds its "
            f"storage of {storage.numel} values."
        )
    if not numel:
        return np.zeros(0, dtype)
    flat = np.frombuffer(data, np.uint8).view(dtype)[tensor.offset :]
    strides = [stride * dtype.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
    """Return a record of the arguments of torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    numbers = (offset, *shape, *strides)
    if (
        not isinstance(storage, _Storage)
        or not isinstance(shape, tuple)
        or not isinstance(strides, tuple)
        or len(shape) != len(strides)
        or len(shape) > _MAX_DIMS
        or any(type(n) is not int or not 0 <= n < 1 << 60 for n in numbers)
    ):
        raise InputError("a tensor has an impossible offset, shape or stride.")
    return _Tensor(storage, offset, shape, strides)


class _Instructions(dict[int, Callable[..., None]]):
    """Handlers of the supported opcodes; any other is an error."""

    def __missing__(self, code: int) -> Callable[..., None]:
        name = {ord(op.code): op.name for op in pickletools.opcodes}.get(code, f"opcode {code}")
        raise InputError(f"its pickle uses {name}, which files of tensors do not need.")


_Unpickler: Any = pickle._Unpickler  # that in C allocates a memo of any size the file demands
_ALLOWED = (
    "PROTO",
    "FRAME",
    "STOP",
    "MARK",
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "EMPTY_TUPLE",
    "EMPTY_LIST",
    "EMPTY_DICT",
    "EMPTY_SET",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "SHORT_BINBYTES",
    "BINUNICODE",
    "BINUNICODE8",
    "SHORT_BINUNICODE",
    "BINSTRING",
    "SHORT_BINSTRING",
    "BINPUT",
    "LONG_BINPUT",
    "MEMOIZE",
    "BINGET",
    "LONG_BINGET",
    "TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "LIST",
    "APPEND",
    "APPENDS",
    "GLOBAL",
    "STACK_GLOBAL",
    "REDUCE",
    "BINPERSID",
)
_CODES = {name: getattr(pickle, name)[0] for name in _ALLOWED}


class _Reader(_Unpickler):
    """Unpickler that may only call `_MAKERS` and set items of dicts."""

    def find_class(self, module: str, name: str) -> _Name:
        is_storage = module in ("torch", "torch.storage") and name in _DTYPES
        wanted = _Name(module, name)
        if is_storage or wanted.is_script_class or (module, name) in _MAKERS:
            return wanted
        raise InputError(
            f"its pickle asks for {module[:99]}.{name[:99]}, which is not allowed: a pickle "
            "can run any program. Save the state dict alone, as safetensors or by "
            "torch.save(model.state_dict(), path)."
        )

    def persistent_load(self, reference: Any) -> _Storage:
        kind, storage_type, key, _, numel, *view = reference
        if (
            kind != "storage"
            or not isinstance(storage_type, _Name)
            or storage_type.name not in _DTYPES
            or type(key) is not str
            or type(numel) is not int
            or not 0 <= numel < 1 << 60
            or any(v is not None for v in view)
        ):
            raise InputError("it has a storage that torch.save would not describe so.")
        return _Storage(np.dtype(_DTYPES[storage_type.name]), key, numel)

    def set_pairs(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict:
            raise InputError(f"its pickle sets items of a {type(target).__name__}.")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):  # hashing nested tuples can take unlimited time
                raise InputError(f"it has a dict with a {type(key).__name__} as key.")
            target[key] = value

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Inert):
            if not isinstance(state, dict):
                raise InputError("it has an object whose state is not a dict.")
            target.attributes = state  # not a copy: many objects may share one state
        elif not isinstance(target, dict | _Tensor):  # states set there do not matter for tensors
            raise InputError(f"its pickle sets the state of a {type(target).__name__}.")

    dispatch: ClassVar[dict[int, Callable[..., None]]] = _Instructions(
        {code: _Unpickler.dispatch[code] for code in _CODES.values()}
        | {
            pickle.NEWOBJ[0]: _Unpickler.load_reduce,
            pickle.SETITEM[0]: lambda self: self.set_pairs([self.stack.pop(-2), self.stack.pop()]),
            pickle.SETITEMS[0]: lambda self: self.set_pairs(self.pop_mark()),
            pickle.BUILD[0]: build,
        }
    )


# Functions that may be called, and their replacements.
_MAKERS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): lambda *_: {},
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch", "Size"): lambda size: size,
    ("torch", "device"): lambda *_: None,
    ("torch.jit._pickle", "restore_type_tag"): lambda value, *_: value,
    **{("torch.jit._pickle", name): lambda value: value for name in _LISTS},
}
