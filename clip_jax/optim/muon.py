"""Muon: momentum, orthogonalised by Newton and Schulz's iteration (Jordan et al. 2024;
arXiv:2502.16982 for the scale of an update)."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from clip_jax.errors import check_ranges
from clip_jax.models.clip import Params
from clip_jax.optim.matrices import Rows, stack_of, with_names

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero; brings singular values to 0.7 .. 1.2


@dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonal updates of the linear maps, each layer's query, key and value apart.

    The rest (words, positions, patches, gains, biases, scalars, convolutions) has AdamW's with b1,
    b2, eps. One moment in memory for a linear map, not two.
    """

    momentum: float = 0.95  # decay of the linear maps' first moment
    nesterov: bool = True  # of both optimizers, as optax.contrib.muon has it
    iterations: int = 5
    # An update's elements are this large on average, about as AdamW's are, so that its rates hold;
    # None: as long as √(outputs / inputs) where that is more than 1, Jordan's.
    rms: float | None = 0.2
    adam_rate: float = 1.0  # the rest's learning rate, as a multiple of learning_rate

    def __post_init__(self) -> None:
        check_ranges(
            self, "optim.optimizer.",
            momentum="[0, 1)", iterations="[1, inf)", rms="(0, inf)", adam_rate="[0, inf)",
        )  # fmt: skip


class MuonState(NamedTuple):
    """The first moment of linear maps."""

    count: Int[Array, ""]
    mu: Params


def scale_by_muon(
    config: Muon, rows: Rows, *, eps: float, first_moment: str
) -> optax.GradientTransformation:
    """Orthogonalise the momentum of linear maps; `rows` must know every parameter as one."""
    beta = config.momentum

    def init(params: Any) -> MuonState:
        mu = optax.tree.zeros_like(params, dtype=jnp.dtype(first_moment))
        return MuonState(jnp.zeros((), jnp.int32), mu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        step: Any = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, beta, 1)
        if config.nesterov:
            ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(step))
            here = optax.tree.bias_correction(updates, beta, step)
            mean = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, here)
        else:
            mean = optax.tree.bias_correction(mu, beta, step)

        def scaled(names: list[str], x: Array) -> Array:
            stack = stack_of(names)
            assert stack
            inputs, outputs = stack.sizes(x.shape)
            if config.rms is None:
                length = math.sqrt(max(1, outputs / inputs))
            else:
                length = config.rms * math.sqrt(max(inputs, outputs))
            return length * stack.apply(lambda x: orthogonal(x, config.iterations, eps), x)

        kept: Any = optax.tree.cast(mu, jnp.dtype(first_moment))
        return with_names(rows, scaled, mean), MuonState(step, kept)

    return optax.GradientTransformation(init, update)


def orthogonal(x: Float[Array, "n r c"], iterations: int, eps: float) -> Float[Array, "n r c"]:
    """Bring the singular values of each matrix near 1: x ← ax + (b·xxᵀ + c·(xxᵀ)²)x."""
    a, b, c = QUINTIC
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + eps)
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.mT


def split(
    linear: optax.GradientTransformation, rest: optax.GradientTransformation, rows: Rows
) -> optax.GradientTransformationExtraArgs:
    """One optimizer for linear maps, another for the rest."""

    def labels(params: Any) -> Any:
        return with_names(rows, lambda names, _: "linear" if stack_of(names) else "rest", params)

    transforms: Mapping[Hashable, Any] = {"linear": linear, "rest": rest}
    return optax.partition(transforms, labels)
