"""Configs to JSON and back; values are checked strictly against the dataclasses."""

import dataclasses
import functools
import json
import os
import types
import typing
from typing import Any, Literal

from clip_jax import parts
from clip_jax.errors import InputError, with_present_names
from clip_jax.storage.files import as_path

PLAIN = (bool, int, float, str, type(None))  # types of values that JSON has, too


def to_dict(config: Any) -> Any:
    """Convert nested dataclasses to JSON values; each has its `type`, as fields may be unions.

    A user's part also has `import`: what to pass to `--import` where the file is read.
    """
    if dataclasses.is_dataclass(config):
        values = {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
        module = parts.origin(type(config)) if isinstance(config, parts.Part) else None
        record = {"type": type(config).__name__} | ({"import": module} if module else {})
        return record | values
    if isinstance(config, list | tuple):
        return [to_dict(x) for x in config]
    if isinstance(config, bool | int | float | str | None):
        return config
    return str(config)  # paths


def to_json(value: Any) -> str:
    """Return values as one line of JSON, with null for NaN and infinity, which JSON lacks."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(json.loads(json.dumps(value), parse_constant=lambda _: None))


def from_dict(kind: Any, data: Any, where: str = "config") -> Any:
    """Read a value of the annotated type `kind` from what `to_dict` wrote.

    Missing fields take their defaults, so that older files stay readable. Raises InputError that
    names the field if it is unknown, has the wrong type or is out of range.
    """
    if type(data) is kind and kind in PLAIN:  # most fields, so this is first
        return data
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(kind, data, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if data not in args:
            raise InputError(f"{where} is {data!r:.200}; it must be one of {list(args)}.")
        return data
    if origin in (typing.Union, types.UnionType):
        return _read_union(args, data, where)
    if origin is tuple:
        return _read_tuple(args, data, where)
    if origin is list:
        return list(_read_tuple((args[0], ...), data, where))
    if kind is Any:
        return data
    if kind is float and type(data) is int and data.bit_length() < 1024:  # larger ones overflow
        return float(data)
    if kind in PLAIN:
        raise InputError(f"{where} is {data!r:.200}; it must be of type {kind.__name__}.")
    if not (isinstance(kind, type) and issubclass(kind, os.PathLike)):
        raise InputError(
            f"{where} is annotated as {kind}, which a config cannot hold; use bool, int, float, "
            "str, Literal, a path, a dataclass, or a tuple or list of these."
        )
    if not isinstance(data, str):
        raise InputError(f"{where} is {data!r:.200}; it must be a string.")
    return as_path(data)  # a path or a URL


def _read_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise InputError(
            f"{where} is {data!r:.200}; it must be an object with {kind.__name__}'s fields."
        )
    data = dict(data)
    data.pop("import", None)
    name = data.pop("type", kind.__name__)
    if name != kind.__name__:
        raise InputError(f"{where}.type is {name!r:.200}; it must be {kind.__name__!r}.")
    hints = {name: parts.opened(hint) for name, hint in _hints(kind).items()}
    fields = {f.name: f for f in dataclasses.fields(kind)}
    data = with_present_names(kind, data)
    if unknown := sorted(set(data) - set(fields)):
        raise InputError(
            f"{where} has unknown fields {unknown}; {kind.__name__} has {', '.join(fields)}. If a "
            "newer clip_jax wrote them, update clip_jax."
        )
    values = {key: from_dict(hints[key], value, f"{where}.{key}") for key, value in data.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in values and field.default is field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}, which {kind.__name__} needs.")
    return kind(**values)


_hints = functools.cache(typing.get_type_hints)  # evaluates texts, for each run of a study


def _read_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if isinstance(data, dict) and any(dataclasses.is_dataclass(k) for k in kinds):
        by_name = {k.__name__: k for k in kinds if dataclasses.is_dataclass(k)}
        name = data.get("type")
        if not isinstance(name, str) or name not in by_name:
            parts.check(data, where)
            raise InputError(f"{where}.type is {name!r:.200}; it must be one of {sorted(by_name)}.")
        return from_dict(by_name[name], data, where)
    errors = []
    for kind in kinds:
        try:
            return from_dict(kind, data, where)
        except InputError as error:
            errors.append(str(error))
    raise InputError(errors[0] if len(set(errors)) == 1 else " Or: ".join(errors))


def _read_tuple(kinds: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise InputError(f"{where} is {data!r:.200}; it must be a list.")
    if kinds[-1:] == (...,):
        kinds = (kinds[0],) * len(data)
    if len(data) != len(kinds):
        raise InputError(f"{where} has {len(data)} values; it must have {len(kinds)}.")
    pairs = enumerate(zip(kinds, data, strict=True))
    return tuple(from_dict(k, x, f"{where}[{i}]") for i, (k, x) in pairs)
