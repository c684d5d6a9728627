"""A conversion is a table: our path, their tensors' names, and how the axes move."""

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange

from clip_jax.convert.tensor_files import Tensors
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIP, CLIPConfig, Params

_SHOWN = 10  # tensors that an error lists

Shape = tuple[int, ...]


class Row(NamedTuple):
    """One parameter of ours and what it is called elsewhere.

    `{}` in their name stands for the number of a block, our leading axis. Several names are stacked
    on a first axis before `axes` applies. `axes` reads "theirs -> ours", 1 for an axis of theirs
    alone; empty: nothing moves.
    """

    ours: str
    theirs: str | tuple[str, ...]
    axes: str = ""
    first: int = 0  # number of their first block,
    step: int = 1  # and how far it is from one to the next

    @property
    def names(self) -> tuple[str, ...]:
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    def names_of(self, block: int) -> list[str]:
        """Return the names that one block of ours has elsewhere."""
        return [name.format(self.first + self.step * block) for name in self.names]

    @property
    def sides(self) -> list[str]:
        return [side.strip() for side in self.axes.split("->")]

    def sizes(self, shape: Shape) -> dict[str, int]:
        """Return the size of every axis, given the shape of one block of ours."""
        return dict(zip(self.sides[1].split(), shape, strict=True)) if self.axes else {}

    def their_shape(self, shape: Shape) -> Shape:
        """Return the shape of each of their tensors, given that of one block of ours."""
        if not self.axes:
            return shape
        sizes = {"1": 1, **self.sizes(shape)}
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.sides[0])
        theirs = tuple(math.prod(sizes[a] for a in (g or one).split()) for g, one in groups)
        return theirs[1:] if len(self.names) > 1 else theirs

    def to_ours(self, arrays: Sequence[np.ndarray], shape: Shape) -> np.ndarray:
        array = np.stack(arrays) if len(arrays) > 1 else arrays[0]
        return rearrange(array, self.axes, **self.sizes(shape)) if self.axes else array

    def to_theirs(self, array: np.ndarray) -> list[np.ndarray]:
        if self.axes:
            array = rearrange(array, " -> ".join(reversed(self.sides)), **self.sizes(array.shape))
        return list(array) if len(self.names) > 1 else [array]


def norm(ours: str, theirs: str) -> list[Row]:
    """Rows of a LayerNorm's gain and bias in PyTorch."""
    return [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]


def linear(ours: str, theirs: str) -> list[Row]:
    """Rows of a linear layer in PyTorch."""
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", "F D -> D F"),
        Row(f"{ours}/bias", f"{theirs}.bias"),
    ]


def heads_out(ours: str, theirs: str) -> list[Row]:
    """Rows of attention's output projection in PyTorch."""
    return [
        Row(f"{ours}/kernel", f"{theirs}.weight", "D (N K) -> N K D"),
        Row(f"{ours}/bias", f"{theirs}.bias"),
    ]


class BlockNames(NamedTuple):
    """What a PyTorch implementation calls the parts of a residual block."""

    ln_1: str
    qkv: tuple[str, ...]  # one fused tensor or three, * for weight or bias
    out: str
    ln_2: str
    fc1: str
    fc2: str


def block_rows(ours: str, theirs: str, names: BlockNames) -> list[Row]:
    """Rows of a stack of residual blocks."""
    weights, biases = (
        tuple(f"{theirs}.{name.replace('*', kind)}" for name in names.qkv)
        for kind in ("weight", "bias")
    )
    fused = len(names.qkv) == 1
    return [
        *norm(f"{ours}/ln_1", f"{theirs}.{names.ln_1}"),
        Row(
            f"{ours}/attn/in_proj/kernel", weights,
            "(S N K) D -> D S N K" if fused else "S (N K) D -> D S N K",
        ),
        Row(
            f"{ours}/attn/in_proj/bias", biases,
            "(S N K) -> S N K" if fused else "S (N K) -> S N K",
        ),
        *heads_out(f"{ours}/attn/out_proj", f"{theirs}.{names.out}"),
        *norm(f"{ours}/ln_2", f"{theirs}.{names.ln_2}"),
        *linear(f"{ours}/mlp/c_fc", f"{theirs}.{names.fc1}"),
        *linear(f"{ours}/mlp/c_proj", f"{theirs}.{names.fc2}"),
    ]  # fmt: skip


def query_rows(ours: str, q: str, kv: str) -> list[Row]:
    """Rows of a query's projection, and of keys' and values' in one; * for weight or bias."""
    return [
        Row(f"{ours}/q/kernel", q.replace("*", "weight"), "(N K) D -> D N K"),
        Row(f"{ours}/q/bias", q.replace("*", "bias"), "(N K) -> N K"),
        Row(f"{ours}/kv/kernel", kv.replace("*", "weight"), "(S N K) D -> D S N K"),
        Row(f"{ours}/kv/bias", kv.replace("*", "bias"), "(S N K) -> S N K"),
    ]


def map_head_rows(theirs: str, latent: str, q: str, kv: str, out: str, ln: str) -> list[Row]:
    """Rows of SigLIP's attention pooling; names below `theirs`."""
    ours = "visual/attn_pool"
    return [
        Row(f"{ours}/latent", f"{theirs}.{latent}"),
        *query_rows(ours, f"{theirs}.{q}", f"{theirs}.{kv}"),
        *heads_out(f"{ours}/proj", f"{theirs}.{out}"),
        *norm(f"{ours}/norm", f"{theirs}.{ln}"),
        *linear(f"{ours}/mlp/c_fc", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/c_proj", f"{theirs}.mlp.fc2"),
    ]


@functools.lru_cache(maxsize=32)
def param_shapes(config: CLIPConfig) -> dict[str, Shape]:
    """Return path → shape of an architecture's parameters; nothing is allocated."""
    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    return {path: x.shape for path, x in flatten(shapes).items()}


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """Write nested dicts as `visual/conv1/kernel` → array."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{prefix}/{name}" if prefix else name
        flat |= flatten(value, path) if isinstance(value, dict) else {path: value}
    return flat


def unflatten(flat: dict[str, Any]) -> Params:
    """Undo `flatten`."""
    params: Params = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda tree, key: tree.setdefault(key, {}), parents, params)[name] = value
    return params


def to_params(rows: Iterable[Row], tensors: Tensors, config: CLIPConfig, source: str) -> Params:
    """Turn their tensors into our nested dict, in the dtypes they have.

    Raises InputError, which lists missing, surplus and misshapen tensors with both shapes.
    """
    shapes = param_shapes(config)
    rows = list(rows)
    _check_rows(rows, shapes, f"{source} cannot be read")
    deepest = max((shapes[row.ours][0] for row in rows if "{}" in row.names[0]), default=0)
    if deepest > len(tensors):  # before a name is made for each
        raise InputError(
            f"{source} does not fit the architecture: its configuration says {deepest} blocks, it "
            f"has {len(tensors)} tensors."
        )
    _check_tensors(_their_shapes(rows, shapes), tensors, source)
    flat = {}
    for row in rows:
        shape = shapes[row.ours]
        if "{}" in row.names[0]:
            blocks = [[tensors[n] for n in row.names_of(i)] for i in range(shape[0])]
            flat[row.ours] = np.stack([row.to_ours(arrays, shape[1:]) for arrays in blocks])
        else:
            flat[row.ours] = row.to_ours([tensors[n] for n in row.names], shape)
    return unflatten(flat)


def from_params(rows: Iterable[Row], params: Params) -> Tensors:
    """Turn our nested dict into their tensors, in the dtypes it has."""
    flat = flatten(params)
    rows = list(rows)
    _check_rows(rows, flat, "the model cannot be written")
    tensors: Tensors = {}
    for row in rows:
        array = np.asarray(flat[row.ours])
        blocks = array if "{}" in row.names[0] else [array]
        for i, block in enumerate(blocks):
            tensors |= zip(row.names_of(i), row.to_theirs(block), strict=True)
    return tensors


def split_queries(tensors: Tensors, is_fused: Callable[[str], bool]) -> Tensors:
    """Split tensors that hold query, key and value into `.q` and `.kv`."""
    separate = {name: x for name, x in tensors.items() if not is_fused(name)}
    for name, x in tensors.items():
        if is_fused(name) and x.ndim and len(x) % 3 == 0:
            separate[f"{name}.q"], separate[f"{name}.kv"] = np.split(x, [len(x) // 3])
    return separate


def join_queries(tensors: Tensors) -> Tensors:
    """Undo `split_queries`."""
    joined = {name: x for name, x in tensors.items() if not name.endswith((".q", ".kv"))}
    for name, x in tensors.items():
        if name.endswith(".q"):
            fused = name.removesuffix(".q")
            joined[fused] = np.concatenate([x, tensors[f"{fused}.kv"]])
    return joined


def _their_shapes(rows: Sequence[Row], shapes: dict[str, Shape]) -> dict[str, Shape]:
    expected = {}
    for row in rows:
        shape = shapes[row.ours]
        many = "{}" in row.names[0]
        theirs = row.their_shape(shape[1:] if many else shape)
        for i in range(shape[0] if many else 1):
            expected |= dict.fromkeys(row.names_of(i), theirs)
    return expected


def _check_rows(rows: Sequence[Row], ours: dict[str, Any], what: str) -> None:
    if left := sorted({row.ours for row in rows} ^ set(ours)):
        raise InputError(
            f"{what}: the format lacks this combination of pooling and projections, and has no "
            f"counterpart of {', '.join(left[:_SHOWN])}. Correct the model's configuration, or "
            "choose --to clip-jax."
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
