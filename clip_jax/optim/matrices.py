"""Tell which dimensions of a stacked parameter form one layer's matrix, by their names.

Layers are stacked in one array (`depth`), and so are query, key and value (`S`). `Rows` maps paths
of parameters to their dimensions' names (`CLIPConfig.dimensions`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from clip_jax.models.clip import path_name

Rows = Mapping[str, str]
# Linear maps between hidden widths, without stacking dimensions: how many dimensions are the input.
# Not among them: embeddings, patches, learned queries, convolutions, the vocabulary projection.
LINEAR = {"D N K": 1, "N K D": 2, "N K E": 2, "D F": 1, "F D": 1, "D E": 1, "D -": 1}


def with_names(rows: Rows, function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Map `function(names of the dimensions, x, *others)` over arrays that `rows` name."""

    def at(path: tuple[Any, ...], *xs: Any) -> Any:
        return function(rows[path_name(path)].split(), *xs)

    return jax.tree_util.tree_map_with_path(at, tree, *others)


def matrix_of(names: list[str]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the axes of one matrix's inputs and outputs; the others stack matrices.

    None if a parameter is not a linear map between hidden widths.
    """
    axes = [i for i, name in enumerate(names) if name not in ("depth", "S")]
    inputs = LINEAR.get(" ".join(names[i] for i in axes))
    return None if inputs is None else (tuple(axes[:inputs]), tuple(axes[inputs:]))
