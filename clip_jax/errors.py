"""The error for invalid input, checks of values that users set, and former names of fields."""

import contextlib
import functools
import math
import numbers
import operator
import warnings
from collections.abc import Callable, Generator, Mapping
from typing import Any, TypeVar

_INT64 = 1 << 63
_SHOWN = 200  # characters of a value in a message
_Kind = TypeVar("_Kind", bound=type)
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".svg", ".pdf")


class InputError(ValueError):
    """Invalid input or wrong use: a command prints the message alone and exits with code 2.

    The message says what is wrong, what is expected and what to change. Any other exception that
    leaves a command is a bug, and shows its traceback.
    """


def shown(value: Any) -> str:
    """Return a value as messages show it: its first 200 characters, as Python writes it."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


@contextlib.contextmanager
def naming(path: Any) -> Generator[None]:
    """Prefix messages of InputError with the file's name if they lack it."""
    try:
        yield
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"{path}: {error}") from error


@contextlib.contextmanager
def needing(message: str) -> Generator[None]:
    """Raise InputError with this message if an import in the block fails."""
    try:
        yield
    except ImportError as error:
        raise InputError(message) from error


def check_ranges(config: Any, where: str = "", **ranges: str) -> None:
    """Raise InputError for a config's numbers outside their ranges, as in `steps="[1, inf)"`.

    None passes; every entry of a tuple must be in the range. NaN is in no range, infinity only if
    the bracket includes it, and integers must fit in 64 bits. `where` precedes the field's name in
    the message.
    """
    for name, text in ranges.items():
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not _is_within(value, *_bounds(text)):
                needed = "within 64 bits" if _is_long(value) else _in_words(*_bounds(text))
                raise InputError(f"{where}{name}={values!r} must be {needed}.")


@functools.cache
def _bounds(text: str) -> tuple[str, float, float, str]:
    """Return opening bracket, minimum, maximum, closing bracket."""
    low, high = text[1:-1].split(",")
    return text[0], float(low), float(high), text[-1]


def _is_long(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not -_INT64 <= int(value) < _INT64


def _is_within(value: Any, opening: str, low: float, high: float, closing: str) -> bool:
    if not isinstance(value, numbers.Real) or _is_long(value):
        return False
    above, below = (operator.le if sign in "[]" else operator.lt for sign in (opening, closing))
    return bool(above(low, value) and below(value, high))


def _in_words(opening: str, low: float, high: float, closing: str) -> str:
    least = f"{'at least' if opening == '[' else 'more than'} {low:.12g}"
    most = f"{'at most' if closing == ']' else 'less than'} {high:.12g}"
    if math.isinf(low) and math.isinf(high):
        return "a finite number"
    if math.isinf(low) or math.isinf(high):
        return most if math.isinf(low) else least
    return f"{least} and {most}"


def check_picture(path: Any, name: str) -> None:
    """Raise InputError unless a path ends in an image format of matplotlib. None passes."""
    if path is not None and not str(path).lower().endswith(_PICTURES):
        raise InputError(f"{name}={str(path)!r} must end in one of {', '.join(_PICTURES)}.")


def read_worker(text: str, name: str = "worker") -> tuple[int, int]:
    """Parse `1/4` to `4/4` into a worker's index, from 0, and the number of workers."""
    number, _, count = text.partition("/")
    digits = all(x.isascii() and x.isdecimal() and len(x) < 10 for x in (number, count))
    if not (digits and 1 <= int(number) <= int(count)):
        raise InputError(f"{name}={text!r} must be i/n with i from 1 to n, such as 1/4.")
    return int(number) - 1, int(count)


# Former names of dataclasses' fields: of each, the present name and the first version without it.
_FORMER_FIELDS: dict[type, dict[str, tuple[str, str]]] = {}


def renamed_fields(until: str, **present: str) -> Callable[[_Kind], _Kind]:
    """Let a dataclass take fields by their former names, as in `window="shuffle_blocks"`.

    In Python, a former name raises a DeprecationWarning. The command line prints its message; files
    are read without a warning. `until` is the first version without the former names.
    """

    def decorate(kind: _Kind) -> _Kind:
        create = kind.__init__

        @functools.wraps(create)
        def init(self: Any, *args: Any, **values: Any) -> None:
            for name in filter(values.__contains__, present):
                message = f"{kind.__name__}: {former_name(name, present[name], until)}"
                warnings.warn(message, DeprecationWarning, stacklevel=2)
            create(self, *args, **with_present_names(kind, values))

        kind.__init__ = init  # ty: ignore[invalid-assignment]
        _FORMER_FIELDS[kind] = {name: (now, until) for name, now in present.items()}
        return kind

    return decorate


def former_fields(kind: type) -> Mapping[str, tuple[str, str]]:
    """Return the former names of a class's fields: of each, the present name and `until`."""
    return {
        name: row for base in kind.__mro__ for name, row in _FORMER_FIELDS.get(base, {}).items()
    }


def with_present_names(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of a dataclass's fields by the present names.

    Raises InputError for a field that has a value by both names.
    """
    present = {name: now for name, (now, _) in former_fields(kind).items()}
    for name, now in present.items():
        if name in values and now in values:
            raise InputError(f"{name} is the former name of {now}; set {now} alone.")
    return {present.get(name, name): value for name, value in values.items()}


def former_name(name: str, now: str, until: str) -> str:
    """Return the warning for the use of a former name."""
    return f"{name} is now {now}. The former name ends with clip_jax {until}."
