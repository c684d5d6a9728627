"""Read JSON files of other libraries, with checks whose messages name file and setting."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clip_jax.errors import InputError
from clip_jax.storage.archives import map_file

MAX_JSON = 16 << 20  # bytes
_LARGEST = 1 << 22  # largest size
_OPTIONAL = ("num_register_tokens", "num_reg_tokens", "reg_tokens")  # sizes that may be 0
_FINITE = 1e6  # largest other number


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises InputError, which names the file."""
    data = map_file(path)
    if len(data) > MAX_JSON:
        raise InputError(f"{path} has {len(data)} bytes; no configuration is that long.")
    try:
        value = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; it must be an object.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def count_of(value: Any, where: str, least: int = 1) -> int:
    """Return a size of another library's configuration. Raises InputError for an unlikely one."""
    if type(value) is not int or not least <= value <= _LARGEST:
        raise InputError(
            f"{where} is {value!r:.99}; it must be an integer from {least} to {_LARGEST}."
        )
    return value


def number_of(value: Any, where: str, positive: bool = False) -> float:
    """Return a finite number, above 0 if `positive`. Raises InputError, which names `where`."""
    if type(value) not in (int, float) or not (0 if positive else -_FINITE) < value < _FINITE:
        least = " above 0" if positive else ""
        raise InputError(f"{where} is {value!r:.99}; it must be a finite number{least}.")
    return float(value)


Table = Mapping[str, tuple[str, int | float]]  # their setting → our field, their default


def by_table(table: Table, config: Any) -> dict[str, Any]:
    """Return their settings for our configuration; inverse of `Settings.fields`."""
    return {name: getattr(config, ours) for name, (ours, _) in table.items()}


class Settings:
    """A section of the JSON, which records the settings that were read."""

    def __init__(self, values: Any, where: str, inert: Iterable[str] = ()) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{where} is {values!r:.99}; it must be an object.")
        self.values, self.where, self.used = values, where, set(inert)

    def get(self, name: str, default: Any, kind: type) -> Any:
        """Return a value of type `kind`; `object` is any type."""
        self.used.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise InputError(f"{self.where}.{name} is {value!r:.99}, which has the wrong type.")
        return value

    def count(self, name: str, default: int) -> int:
        least = 0 if name in _OPTIONAL else 1
        return count_of(self.get(name, default, object), f"{self.where}.{name}", least)

    def number(self, name: str, default: float) -> float:
        return number_of(self.get(name, default, object), f"{self.where}.{name}", positive=True)

    def fields(self, table: Table) -> dict[str, Any]:
        """Return the fields of our configuration for these settings."""
        read: dict[type, Any] = {int: self.count, float: self.number}
        return {ours: read[type(default)](name, default) for name, (ours, default) in table.items()}

    def finish(self) -> None:
        """Raise InputError for a setting that was not read and is not off."""
        for name, value in self.values.items():
            if name not in self.used and value not in (None, False, 0, "", {}, []):
                raise InputError(f"{self.where}.{name}={value!r:.99} is not supported by clip_jax.")
