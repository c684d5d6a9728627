"""What of a parameter is one layer's and one matrix, by the names of its dimensions.

Layers are stacked in one array (`depth`), and so are query, key and value (`S`). `Rows` are those
of `CLIPConfig.dimensions`.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

Rows = Mapping[str, str]
# Linear maps between hidden widths, apart from what stacks them: how many dimensions are the input.
# Not among them: words, positions, patches, learned queries, convolutions, and the output words.
LINEAR = {"D N K": 1, "N K D": 2, "N K E": 2, "D F": 1, "F D": 1, "D E": 1, "D -": 1}


def with_names(rows: Rows, function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Map `function(names of the dimensions, x, *others)` over arrays that `rows` name."""

    def at(path: tuple[Any, ...], *xs: Any) -> Any:
        return function(rows[path_of(path)].split(), *xs)

    return jax.tree_util.tree_map_with_path(at, tree, *others)


def path_of(path: tuple[Any, ...]) -> str:
    """Write a tree path as `visual/conv1/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Stack(NamedTuple):
    """An array of matrices: axes that stack them, of their inputs, of their outputs."""

    stacked: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Count the inputs and outputs of one matrix."""
        inputs, outputs = ([shape[i] for i in axes] for axes in (self.inputs, self.outputs))
        return math.prod(inputs), math.prod(outputs)

    def apply(self, function: Callable[[Array], Array], x: Array) -> Array:
        """Apply a function of matrices [n, inputs, outputs] to all of them."""
        order = [*self.stacked, *self.inputs, *self.outputs]
        back = sorted(range(x.ndim), key=order.__getitem__)
        turned = x.transpose(order)
        return (
            function(turned.reshape(-1, *self.sizes(x.shape))).reshape(turned.shape).transpose(back)
        )


def stack_of(names: list[str]) -> Stack | None:
    """Find the matrices of a parameter; None where it is no linear map between hidden widths."""
    stacked = tuple(i for i, name in enumerate(names) if name in ("depth", "S"))
    own = [i for i in range(len(names)) if i not in stacked]
    inputs = LINEAR.get(" ".join(names[i] for i in own))
    return None if inputs is None else Stack(stacked, tuple(own[:inputs]), tuple(own[inputs:]))
