"""Foreign JSON files and their values, checked where they are read, so that messages name them."""

import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_jax.convert.archives import map_file
from clip_jax.errors import InputError

MAX_JSON = 16 << 20  # bytes
_LARGEST = 1 << 22  # of a size
_FINITE = 1e6  # of any other number


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. InputError names the file and what is wrong."""
    data = map_file(path)
    if len(data) > MAX_JSON:
        raise InputError(f"{path} has {len(data)} bytes; no configuration is that long.")
    try:
        value = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds a {type(value).__name__}; an object is needed.")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object so that people can read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def count_of(value: Any, where: str) -> int:
    """Return a size that a foreign configuration gives. Raises InputError unless it is a sensible
    one."""
    if type(value) is not int or not 1 <= value <= _LARGEST:
        raise InputError(
            f"{where} is {value!r:.99}; a whole number from 1 to {_LARGEST} is needed."
        )
    return value


def number_of(value: Any, where: str, positive: bool = False) -> float:
    """Return a finite number, above 0 if it has to be. InputError names where it stands."""
    if type(value) not in (int, float) or not (0 if positive else -_FINITE) < value < _FINITE:
        least = " above 0" if positive else ""
        raise InputError(f"{where} is {value!r:.99}; a finite number{least} is needed.")
    return float(value)


@contextmanager
def naming(path: Path | str) -> Generator[None]:
    """Put the file's name before a message about a value of it that does not have it."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from error


Table = Mapping[str, tuple[str, int | float]]  # their setting → our field, their default


def by_table(table: Table, config: Any) -> dict[str, Any]:
    """Return the settings of a configuration of ours; undoes `Settings.fields`."""
    return {name: getattr(config, ours) for name, (ours, _) in table.items()}


class Settings:
    """One section of the JSON; it remembers which of its values were read."""

    def __init__(self, values: Any, where: str, inert: Iterable[str] = ()) -> None:
        if not isinstance(values, dict):
            raise InputError(f"{where} is {values!r:.99}; an object is needed.")
        self.values, self.where, self.used = values, where, set(inert)

    def get(self, name: str, default: Any, kind: type) -> Any:
        """Return a value of the wanted type: `object` for any."""
        self.used.add(name)
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, kind):
            raise InputError(f"{self.where}.{name} is {value!r:.99}, of the wrong type.")
        return value

    def count(self, name: str, default: int) -> int:
        return count_of(self.get(name, default, object), f"{self.where}.{name}")

    def number(self, name: str, default: float) -> float:
        return number_of(self.get(name, default, object), f"{self.where}.{name}", positive=True)

    def fields(self, table: Table) -> dict[str, Any]:
        """Read the fields of a configuration of ours."""
        read: dict[type, Any] = {int: self.count, float: self.number}
        return {ours: read[type(default)](name, default) for name, (ours, default) in table.items()}

    def finish(self) -> None:
        """Raise InputError for a setting that nothing has read and that is not off."""
        for name, value in self.values.items():
            if name not in self.used and value not in (None, False, 0, "", {}, []):
                raise InputError(f"{self.where}.{name}={value!r:.99} is not supported by clip_jax.")
