"""LAMB's trust ratio (You et al. 2020, arXiv:1904.00962, algorithm 2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from clip_jax.optim.matrices import Rows, with_names
from clip_jax.optim.optimizer import Optimizer, adam, decay, decay_mask


@dataclass(frozen=True, kw_only=True)
class LAMB(Optimizer):
    """LAMB (arXiv:1904.00962): AdamW with updates scaled to the norm of their layer's weights."""

    def chain(self, config: Any, rows: Rows) -> list[Any]:
        """Return Adam's moments, weight decay and the trust ratio."""
        return [adam(config), decay(config), scale_by_trust_ratio(rows, decay_mask)]


def scale_by_trust_ratio(
    rows: Rows, adapts: Callable[[Any], Any]
) -> optax.GradientTransformationExtraArgs:
    """Scale each update to the norm of its parameter; stacked layers are scaled separately.

    `adapts(params)` is True for the parameters to which this applies. If a norm is zero, the ratio
    is 1.
    """

    def scaled(names: list[str], update: Array, param: Array, adapt: bool) -> Array:
        if not adapt:
            return update
        axes = tuple(i for i, name in enumerate(names) if name != "depth")
        squares = (jnp.sum(jax.lax.square(x), axes, keepdims=True) for x in (param, update))
        length, of_update = map(jnp.sqrt, squares)
        is_defined = (length > 0) & (of_update > 0)
        return update * jnp.where(is_defined, length / jnp.where(is_defined, of_update, 1), 1)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        return with_names(rows, scaled, updates, params, adapts(params)), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
