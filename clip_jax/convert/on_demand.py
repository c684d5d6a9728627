"""Parameters of open weights: their names and shapes are known, their values are read on demand."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from clip_jax.models.clip import Params, path_name

Index = tuple[Any, ...]  # a slice for each axis; (): all of an array


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter; `np.asarray` reads it, an index reads a part."""

    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]  # where the format allows it, only that part of the file

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self.read(index if isinstance(index, tuple) else (index,)))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(()), dtype, copy=copy)


def read_together(shapes: Params, load: Callable[[], Params]) -> Params:
    """Return parameters that are all read by the first of them, by `load`, and then kept."""

    @functools.cache
    def arrays() -> dict[str, np.ndarray]:
        leaves = jax.tree_util.tree_leaves_with_path(load())
        return {path_name(path): np.asarray(x) for path, x in leaves}

    def parameter(path: Any, like: Any) -> Parameter:
        name = path_name(path)
        return Parameter(like.shape, lambda index: arrays()[name][index])

    return jax.tree_util.tree_map_with_path(parameter, shapes)


def checked(params: Params, check: Callable[[str, np.ndarray], None]) -> Params:
    """Return parameters whose values are checked, with their names, whenever they are read."""

    def parameter(path: Any, x: Any) -> Parameter:
        def read(index: Index) -> np.ndarray:
            values = np.asarray(x[index])
            check(path_name(path), values)
            return values

        return Parameter(x.shape, read)

    return jax.tree_util.tree_map_with_path(parameter, params)


def loaded(params: Params) -> Params:
    """Read all parameters; return a tree of arrays."""
    return jax.tree.map(np.asarray, params)
