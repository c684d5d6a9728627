"""Checks of types and array shapes by beartype, for jaxtyping's option `--jaxtyping-packages`.

For each definition of a function jaxtyping writes two others, which have its signature and do
nothing, and lets them be checked. A local function is defined at each call of the function around
it, and each time beartype would compile the same checks, which takes milliseconds. So functions
that cannot be told apart share their checks.
"""

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

from beartype import BeartypeConf, beartype

_with_checks = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int is a float, too


class _Stub:
    """A function; equal to another if both have the same name, code and signature."""

    def __init__(self, function: FunctionType) -> None:
        self.function = function
        name = (function.__module__, function.__qualname__)
        self._key = (name, function.__code__, inspect.signature(function))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Stub) and self._key == other._key


@functools.cache
def _shared(stub: _Stub) -> Callable[..., Any]:
    return _with_checks(stub.function)


def checked(function: FunctionType) -> Callable[..., Any]:
    """Return a function with checks of its arguments and of what it returns."""
    code = function.__code__
    if code.co_names or code.co_freevars:  # its code alone does not say what it does
        return _with_checks(function)
    try:
        return _shared(_Stub(function))
    except TypeError:  # an annotation or a default value has no hash
        return _with_checks(function)
