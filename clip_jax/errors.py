"""The one error that a person caused and can mend, and the checks of what a person gives."""

import math
import numbers
import operator
from typing import Any

_INT64 = 1 << 63
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".svg", ".pdf")


class InputError(ValueError):
    """Wrong use or wrong input, refused on purpose: one message, exit code 2.

    The message says what was given, what is needed and where to change it. Any other exception
    that leaves a command is a bug, and shows its traceback.
    """


def check_ranges(config: Any, where: str = "", **ranges: str) -> None:
    """Refuse numbers of a config outside their ranges, written as in `steps="[1, inf)"`.

    None passes; every entry of a tuple has to lie inside. NaN lies in no range, infinity only
    where the bracket says so, and an integer takes no more than 64 bits. `where` stands before the
    field's name in the message.
    """
    for name, text in ranges.items():
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value is not None and not _is_within(value, *_bounds(text)):
                needed = "of 64 bits" if _is_long(value) else _in_words(*_bounds(text))
                raise InputError(f"{where}{name}={values!r} must be {needed}.")


def _bounds(text: str) -> tuple[str, float, float, str]:
    """Opening bracket, least, largest, closing bracket."""
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
    """Refuse a path whose ending names no picture format that matplotlib writes. None passes."""
    if path is not None and not str(path).lower().endswith(_PICTURES):
        raise InputError(f"{name}={str(path)!r} must end in one of {', '.join(_PICTURES)}.")


def read_worker(text: str) -> tuple[int, int]:
    """Read `1/4` to `4/4`: the number of a worker, from 0 on, and how many there are."""
    number, _, count = text.partition("/")
    digits = all(x.isascii() and x.isdecimal() and len(x) < 10 for x in (number, count))
    if not (digits and 1 <= int(number) <= int(count)):
        raise InputError(f"worker={text!r} must be i/n with i from 1 to n, such as 1/4.")
    return int(number) - 1, int(count)
