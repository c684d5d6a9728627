"""Convert parameters by a table of our paths, their tensors' names, and the order of axes.

A format has a `Convention`, whose rules generate the table of any architecture.
"""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from flax import traverse_util

from clip_jax.convert.on_demand import Index, Parameter
from clip_jax.convert.tensor_files import Tensors
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig, Params, parameters

_SHOWN = 10  # most tensors that an error lists

Shape = tuple[int, ...]
Rules = Sequence[tuple[str, str]]  # a regular expression and its replacement


@dataclass(frozen=True)
class Convention:
    """How a format names our parameters, and the order of their axes.

    All rules of `names`, in order, turn our path into their name; `[q,k]` in it means several
    tensors. The first rule of `axes` that matches our path gives the order of axes. In a sum, the
    rules of the first summand come first.
    """

    names: Rules = ()
    axes: Rules = ()

    def __add__(self, other: "Convention") -> "Convention":
        return Convention((*self.names, *other.names), (*self.axes, *other.axes))


# The last summand of PyTorch's formats; S is query, key and value.
TORCH = Convention(
    names=(
        (r"token_embedding$", "token_embedding/weight"),
        (r"/(kernel|scale)$", "/weight"),
        (r"/in_proj/", "/in_proj_"),
        (r"/(attn|attention)/(q|kv)/(\w+)$", r"/\1/in_proj_\3.\2"),
        ("/", "."),
    ),
    axes=(
        (r"/(conv\d|downsample/0)/kernel$", "D C P Q -> P Q C D"),
        (r"/(in_proj|kv)/kernel$", "(S N K) D -> D S N K"),
        (r"/(in_proj|kv)/bias$", "(S N K) -> S N K"),
        (r"/(q|[qkv]_proj)/kernel$", "(N K) D -> D N K"),
        (r"/(q|[qkv]_proj)/bias$", "(N K) -> N K"),
        (r"/(out_proj|attnpool/c_proj|attn_pool/proj)/kernel$", "D (N K) -> N K D"),
        (r"/mlp/\w+/kernel$", "F D -> D F"),
    ),
)
_BLOCK = re.compile(r"\{(\d*):?(\d*)\}")
_AXIS = re.compile(r"\(([^)]*)\)|(\S+)")  # a group of axes, or one
_SEVERAL = re.compile(r"\[(.*)\]")


class Row(NamedTuple):
    """One of our parameters and its names in another format.

    Names that end with `.q` and `.kv` are parts of one tensor of theirs.

    `{}` in a name is the number of a block, our leading axis; `{1:2}` is the blocks 1, 3, 5, ….
    Several names are stacked on a first axis before `axes` applies. `axes` is "theirs -> ours", 1
    for an axis that only they have, "(H W)" for a square grid; empty: the same order.
    """

    ours: str
    names: tuple[str, ...]
    axes: str

    @property
    def is_stack(self) -> bool:
        return _BLOCK.search(self.names[0]) is not None

    def names_of(self, block: int) -> list[str]:
        """Return their names for one of our blocks."""
        return [
            _BLOCK.sub(lambda match: str(int(match[1] or 0) + int(match[2] or 1) * block), name)
            for name in self.names
        ]

    @property
    def sides(self) -> list[str]:
        return [side.strip() for side in self.axes.split("->")]

    def sizes(self, shape: Shape) -> dict[str, int]:
        """Return the size of every axis, given the shape of one of our blocks."""
        sizes: dict[str, int] = {}
        if not self.axes:
            return sizes
        for (grid, axis), size in zip(_AXIS.findall(self.sides[1]), shape, strict=True):
            sizes |= dict.fromkeys(grid.split(), math.isqrt(size)) if grid else {axis: size}
        return sizes

    def their_shape(self, shape: Shape) -> Shape:
        """Return the shape of each of their tensors, given that of one of our blocks."""
        if not self.axes:
            return shape
        sizes = {"1": 1, **self.sizes(shape)}
        groups = _AXIS.findall(self.sides[0])
        theirs = tuple(math.prod(sizes[a] for a in (g or axis).split()) for g, axis in groups)
        return theirs[1:] if len(self.names) > 1 else theirs

    def to_ours(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        array = np.stack(arrays) if len(arrays) > 1 else arrays[0]
        return rearrange(array, self.axes, **self.sizes(shape)) if self.axes else array

    def to_theirs(self, array: np.ndarray) -> list[np.ndarray]:
        if self.axes:
            array = rearrange(array, " -> ".join(reversed(self.sides)), **self.sizes(array.shape))
        return list(array) if len(self.names) > 1 else [array]


def table(config: CLIPConfig, convention: Convention) -> list[Row]:
    """Return a row for each parameter of an architecture."""
    rows = []
    for path in param_shapes(config):
        name = path
        for pattern, replacement in convention.names:
            name = re.sub(pattern, replacement, name)
        several = _SEVERAL.search(name)
        parts = several[1].split(",") if several else [""]
        moves = next((moves for pattern, moves in convention.axes if re.search(pattern, path)), "")
        if several:
            moves = moves.replace("(S ", "S (")
        rows.append(Row(path, tuple(_SEVERAL.sub(part, name) for part in parts), moves))
    return rows


def param_shapes(config: CLIPConfig) -> dict[str, Shape]:
    """Return path → shape of an architecture's parameters."""
    return {path: box.value.shape for path, box in parameters(config).items()}


def flatten(params: Params) -> dict[str, Any]:
    """Write nested dicts as `visual/conv1/kernel` → array."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: dict[str, Any]) -> Params:
    """Return nested dicts: the inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def to_params(rows: Sequence[Row], tensors: Tensors, config: CLIPConfig, source: str) -> Params:
    """Turn their tensors into our nested dict, in their dtypes; each is read on demand.

    Raises InputError, which lists missing, surplus and misshapen tensors with both shapes.
    """
    shapes = param_shapes(config)
    deepest = max((shapes[row.ours][0] for row in rows if row.is_stack), default=0)
    if deepest > len(tensors):  # before creating so many names
        raise InputError(
            f"{source} does not fit the architecture: its configuration has {deepest} blocks, "
            f"but it has {len(tensors)} tensors; correct one of them."
        )
    expected = _their_shapes(rows, shapes)
    separate = _with_queries(tensors, expected)
    _check_tensors(expected, separate, source)
    check_floating(tensors, source)
    return unflatten({row.ours: _parameter(row, separate, shapes[row.ours]) for row in rows})


def _parameter(row: Row, tensors: Tensors, shape: Shape) -> Parameter:
    """Return one of our parameters, of which a part is read from the same part of their tensors."""
    if not row.is_stack:
        arrays = [tensors[name] for name in row.names]
        return Parameter(shape, lambda index: row.to_ours(arrays, shape)[index])
    blocks = [[tensors[name] for name in row.names_of(block)] for block in range(shape[0])]

    def read(index: Index) -> np.ndarray:
        chosen, *within = index or (slice(None),)
        if not isinstance(chosen, slice):
            return row.to_ours(blocks[chosen], shape[1:])[tuple(within)]
        parts = [row.to_ours(arrays, shape[1:])[tuple(within)] for arrays in blocks[chosen]]
        return np.stack(parts)

    return Parameter(shape, read)


def from_params(rows: Iterable[Row], params: Params) -> Tensors:
    """Turn our nested dict into their tensors, in our dtypes."""
    flat = flatten(params)
    tensors: Tensors = {}
    for row in rows:
        array = np.asarray(flat[row.ours])
        blocks = array if row.is_stack else [array]
        for i, block in enumerate(blocks):
            tensors |= zip(row.names_of(i), row.to_theirs(block), strict=True)
    for name in [name for name in tensors if name.endswith(".q")]:
        fused = name.removesuffix(".q")
        tensors[fused] = np.concatenate([tensors.pop(name), tensors.pop(f"{fused}.kv")])
    return tensors


def _with_queries(tensors: Tensors, expected: Collection[str]) -> Tensors:
    """Split fused tensors of query, key and value that are expected as `.q` and `.kv`."""
    separate: Tensors = {}
    for name, x in tensors.items():
        if f"{name}.q" in expected and x.ndim and len(x) % 3 == 0:
            separate[f"{name}.q"], separate[f"{name}.kv"] = np.split(x, [len(x) // 3])
        else:
            separate[name] = x
    return separate


def _their_shapes(rows: Sequence[Row], shapes: dict[str, Shape]) -> dict[str, Shape]:
    expected = {}
    for row in rows:
        shape = shapes[row.ours]
        theirs = row.their_shape(shape[1:] if row.is_stack else shape)
        for i in range(shape[0] if row.is_stack else 1):
            expected |= dict.fromkeys(row.names_of(i), theirs)
    return expected


def check_floating(tensors: Tensors, source: str) -> None:
    """Raise InputError unless all tensors are floating-point, before arithmetic converts them."""
    for name, x in tensors.items():
        if x.dtype.kind in "biuc":
            raise InputError(
                f"{source}: {name} has the type {x.dtype}; weights must be floating-point. Save "
                "them as float32, float16 or bfloat16, unquantized."
            )


def _check_tensors(expected: dict[str, Shape], tensors: Tensors, source: str) -> None:
    complaints = [
        *(f"{n}: missing, {list(s)} needed" for n, s in expected.items() if n not in tensors),
        *(f"{n}: surplus, {list(x.shape)}" for n, x in tensors.items() if n not in expected),
        *(
            f"{n}: {list(tensors[n].shape)} found, {list(s)} needed"
            for n, s in expected.items()
            if n in tensors and tensors[n].shape != s
        ),
    ]
    if complaints:
        more = len(complaints) - _SHOWN
        raise InputError(
            f"{source} does not fit the architecture; {len(complaints)} tensors differ:\n  "
            + "\n  ".join(complaints[:_SHOWN])
            + (f"\n  and {more} more" if more > 0 else "")
        )
