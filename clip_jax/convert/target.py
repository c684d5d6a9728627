"""Interface of a format of `convert --to`: writing, assumptions, reference implementation.

Each such format has a module with a `TARGET`, and an entry in `formats.TARGETS`.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import jax

from clip_jax.convert.verify import Reference
from clip_jax.convert.weights import DType, Weights, cast
from clip_jax.errors import InputError
from clip_jax.models.clip import Params

# Field or property of the configuration → the value that the format supports, or a tuple of them; a
# class matches its own objects. Fields that a tower does not have are skipped.
Assumptions = dict[str, Any]


# What no other library's format has.
_OWN: Assumptions = {"image_head": None, "text.biases": "qkv"}
_OWN_REASONS = {"image_head": "no other library has dino.txt's head"}


class Inexpressible(InputError):
    """A model that a format cannot express; `formats.write_weights` adds which formats can.

    `remedy` is what else can be done.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(f"{problem}; {remedy}" if remedy else problem)
        self.remedy = remedy


def check_assumptions(
    weights: Weights,
    name: str,
    assumptions: Assumptions,
    reasons: Mapping[str, str] | None = None,
) -> None:
    """Raise Inexpressible, which lists what a format called `name` cannot express, if anything.

    Fields are those of `CLIPConfig`, below `preprocess.`, or `only_tower`; `reasons` are added to
    the message.
    """
    problems: dict[str, str] = {}
    reasons = _OWN_REASONS | dict(reasons or {})
    for field, expected in (_OWN | assumptions).items():
        if field.partition(".")[0] in problems:  # another kind of tower: skip its fields
            continue
        is_of_config = field.partition(".")[0] not in ("preprocess", "only_tower")
        root = weights.config if is_of_config else weights
        try:
            value = operator.attrgetter(field)(root)
        except AttributeError:
            continue
        values = expected if isinstance(expected, tuple) else (expected,)
        if any(type(value) is x if isinstance(x, type) else value == x for x in values):
            continue
        reason = f": {reasons[field]}" if field in reasons else ""
        needed = " or ".join(map(_shown, values))
        problems[field] = f"{field}={_shown(value)} (needs {needed}{reason})"
    if problems:
        listed = ", ".join(problems.values())
        raise Inexpressible(f"{name} cannot express this model's {listed}")


def _shown(value: Any) -> str:
    kind = value if isinstance(value, type) else type(value)
    return kind.__name__ if kind is value or is_dataclass(kind) else repr(value)


def assumed(prefix: str, value: Any, *but: str) -> dict[str, Any]:
    """Return assumptions that the fields of a dataclass, except `but`, equal those of `value`.

    A tuple, such as an image mean, is one value.
    """
    names = [field.name for field in fields(value) if field.name not in but]
    values = {f"{prefix}.{name}": getattr(value, name) for name in names}
    return {name: (x,) if isinstance(x, tuple) else x for name, x in values.items()}


def fixed(assumptions: Assumptions, prefix: str) -> dict[str, Any]:
    """Return the fields of a tower's configuration that a format fixes."""
    return {
        name.removeprefix(f"{prefix}."): value
        for name, value in assumptions.items()
        if name.startswith(f"{prefix}.") and not isinstance(value, tuple)
    }


def rounded(weights: Weights, dtype: DType | None) -> Params:
    """Return a model's parameters as stored in a file of `dtype`."""
    if dtype in (None, "float32"):
        return weights.params
    return jax.tree.map(lambda x: cast(x, dtype), weights.params)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A format that `convert --to` writes."""

    write: Callable[..., None]  # of weights and a path; `dtype=None` keeps each array's
    check: Callable[[Weights], Any]  # raises Inexpressible if the format cannot express a model
    has_single_towers: bool = False  # whether it can express one tower of a model alone
    # Loads the model at a path by the library of the format, for --verify; None: it is clip_jax.
    # Raises Unverifiable if that library has no such model, NotInstalled without the library.
    load: Callable[[Weights, Path], Reference] | None
    rounded: Callable[[Weights, DType | None], Params] = rounded  # the weights it uses
    # Returns the model as the library will compute it, if the format cannot express its activation.
    as_computed: Callable[[Weights], Weights] | None = None
    # Files by which a folder of the format is recognised; none: the format is a single file.
    names: tuple[str, ...] = ()
    use: str = ""  # how to load a folder, for its model card
    use_naflex: str = ""  # what to know of a NaFlex model beside that
    use_tower: Callable[[Weights], str] = lambda weights: ""  # how to load one tower alone
