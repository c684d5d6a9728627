"""Adafactor as in big_vision (Zhai et al. 2022, arXiv:2106.04560, section 3.3): with momentum,
without relative steps or clipping, and with a cap on the second moment's decay."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from clip_jax.errors import check_ranges
from clip_jax.models.clip import Params
from clip_jax.optim.matrices import Rows, with_names
from clip_jax.optim.optimizer import Optimizer, decay

SQUARE_EPS = 1e-30  # added to the gradient's squares


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor (Shazeer & Stern, arXiv:1804.04235): second moment factored into rows and columns.

    optim.b1 is the momentum's decay rate, optim.b2 the cap on the second moment's. big_vision
    stores the momentum in bfloat16 (optim.first_moment).
    """

    exponent: float = 0.8  # The second moment's decay rate is 1 − step^−exponent, at most b2.
    min_size: int = 32  # Matrices with a smaller side keep the second moment of every element.

    def __post_init__(self) -> None:
        check_ranges(self, "optim.optimizer.", exponent="(0, inf)", min_size="[1, inf)")

    def chain(self, config: Any, rows: Rows) -> list[Any]:
        """Return the factored second moment with momentum, and weight decay."""
        moments = {"b1": config.b1, "b2": config.b2, "first_moment": config.first_moment}
        return [scale_by_adafactor(self, rows, **moments), decay(config)]


class AdafactorState(NamedTuple):
    """Momentum, and the second moment as means along a matrix's two sides, of length 1 there.

    If a parameter is not factored, `nu_row` has every element and `nu_col` no array.
    """

    count: Int[Array, ""]
    mu: Params
    nu_row: Params  # mean along the largest dimension
    nu_col: Params  # mean along the second largest


class _Scaled(NamedTuple):
    update: Any
    nu_row: Any
    nu_col: Any


def scale_by_adafactor(
    config: Adafactor, rows: Rows, *, b1: float, b2: float, first_moment: str
) -> optax.GradientTransformation:
    """Divide by the root of the factored second moment, then apply momentum, not bias-corrected.

    The two largest dimensions of a layer form its matrix. Layers, query, key and value, and other
    dimensions such as heads give separate matrices.
    """
    dtype = jnp.dtype(first_moment)

    def empty(names: list[str], x: Array) -> _Scaled:
        sides = _sides(names, x.shape, config.min_size)
        if sides is None:
            return _Scaled(None, jnp.zeros_like(x), optax.MaskedNode())
        nu = (jnp.zeros([1 if i == side else n for i, n in enumerate(x.shape)]) for side in sides)
        return _Scaled(None, *nu)

    def init(params: Any) -> AdafactorState:
        _, nu_row, nu_col = _apart(with_names(rows, empty, params))
        mu: Any = optax.tree.zeros_like(params, dtype=dtype)
        return AdafactorState(jnp.zeros((), jnp.int32), mu, nu_row, nu_col)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AdafactorState]:
        step: Any = optax.safe_increment(state.count)
        decay = jnp.minimum(b2, 1 - step.astype(jnp.float32) ** -config.exponent)

        def scaled(names: list[str], g: Array, nu_row: Array, nu_col: Any) -> _Scaled:
            square = jnp.square(g) + SQUARE_EPS
            sides = _sides(names, g.shape, config.min_size)
            if sides is None:
                nu = decay * nu_row + (1 - decay) * square
                return _Scaled(g / jnp.sqrt(nu), nu, nu_col)
            nu_row, nu_col = (
                decay * nu + (1 - decay) * square.mean(side, keepdims=True)
                for nu, side in zip((nu_row, nu_col), sides, strict=True)
            )
            relative = nu_row / nu_row.mean(sides[1], keepdims=True)
            return _Scaled(g / jnp.sqrt(relative) / jnp.sqrt(nu_col), nu_row, nu_col)

        updates, nu_row, nu_col = _apart(
            with_names(rows, scaled, updates, state.nu_row, state.nu_col)
        )
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        stored: Any = optax.tree.cast(mu, dtype)
        return mu, AdafactorState(step, stored, nu_row, nu_col)

    return optax.GradientTransformation(init, update)


def _sides(names: list[str], shape: tuple[int, ...], min_size: int) -> tuple[int, int] | None:
    """Return the axes of a layer's largest and second largest dimension; None if too small."""
    axes = [i for i, name in enumerate(names) if name not in ("depth", "S")]
    if len(axes) < 2:
        return None
    second, first = (axes[i] for i in np.argsort([shape[i] for i in axes], kind="stable")[-2:])
    return (first, second) if shape[second] >= min_size else None


def _apart(tree: Any) -> list[Any]:
    """Split a tree of triples into three trees."""
    flat, structure = jax.tree.flatten(tree, is_leaf=lambda x: isinstance(x, _Scaled))
    return [structure.unflatten(parts) for parts in zip(*flat, strict=True)]
