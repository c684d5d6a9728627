"""Muon: momentum, orthogonalised by Newton-Schulz iterations (Jordan et al. 2024;
arXiv:2502.16982 for the scale of an update)."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Int

from clip_jax.errors import check_ranges, renamed_fields
from clip_jax.models.clip import Params
from clip_jax.optim.matrices import Rows, matrix_of, with_names
from clip_jax.optim.optimizer import Optimizer, adam, decay

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero; brings singular values to 0.7 .. 1.2


@renamed_fields("0.3.0", adam_rate="adam_learning_rate_scale")
@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon: orthogonalised momentum for linear maps, AdamW for all other parameters.

    Query, key and value of each layer are separate maps. AdamW (optim.b1, optim.b2, optim.eps)
    updates embeddings, patches, gains, biases, scalars and convolutions. Linear maps store one
    moment instead of two.
    """

    momentum: float = 0.95  # Decay rate of the first moment of linear maps.
    nesterov: bool = True  # Nesterov momentum in both optimizers, as in optax.contrib.muon.
    iterations: int = 5  # Newton-Schulz iterations per update.
    # Root mean square of an update's elements; 0.2 is close to AdamW's, so its learning rates carry
    # over. None: scale by √(outputs / inputs) where that exceeds 1 (Jordan et al.).
    rms: float | None = 0.2
    adam_learning_rate_scale: float = 1.0  # Factor on the learning rate of AdamW's parameters.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "optim.optimizer.",
            momentum="[0, 1)",
            iterations="[1, inf)",
            rms="(0, inf)",
            adam_learning_rate_scale="[0, inf)",
        )

    def chain(self, config: Any, rows: Rows) -> list[Any]:
        """Return one transformation: of linear maps by Muon, of the rest by AdamW."""
        scale = scale_by_muon(self, rows, eps=config.eps, first_moment=config.first_moment)
        rest = optax.chain(
            adam(config, nesterov=self.nesterov),
            decay(config),
            optax.scale(self.adam_learning_rate_scale),
        )
        return [split(optax.chain(scale, decay(config)), rest, rows)]


class MuonState(NamedTuple):
    """Step count and first moments of the linear maps."""

    count: Int[Array, ""]
    mu: Params


def scale_by_muon(
    config: Muon, rows: Rows, *, eps: float, first_moment: str
) -> optax.GradientTransformation:
    """Orthogonalise the momentum of linear maps; by `rows`, every parameter must be one.

    It wraps optax.contrib.scale_by_muon, whose third state, the iteration's coefficients, is a
    constant here and is not saved.
    """
    muon = optax.contrib.scale_by_muon(
        ns_steps=config.iterations,
        beta=config.momentum,
        eps=eps,
        mu_dtype=jnp.dtype(first_moment),
        nesterov=config.nesterov,
        weight_dimension_numbers=lambda tree: with_names(rows, dimension_numbers, tree),
    )

    def dimension_numbers(names: list[str], _: Any) -> optax.contrib.MuonDimensionNumbers:
        return optax.contrib.MuonDimensionNumbers(*(matrix_of(names) or ()))

    def init(params: Any) -> MuonState:
        state: Any = muon.init(params)
        return MuonState(state.count, state.mu)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        before = optax.contrib.MuonState(state.count, state.mu, jnp.asarray(QUINTIC))
        result: Any = muon.update(updates, before)
        return with_names(rows, scaled, result[0]), MuonState(result[1].count, result[1].mu)

    def scaled(names: list[str], x: Array) -> Array:
        inputs, outputs = (math.prod(x.shape[i] for i in axes) for axes in matrix_of(names) or ())
        if config.rms is None:
            return math.sqrt(max(1, outputs / inputs)) * x
        return config.rms * math.sqrt(max(inputs, outputs)) * x

    return optax.GradientTransformation(init, update)


def split(
    linear: optax.GradientTransformation, rest: optax.GradientTransformation, rows: Rows
) -> optax.GradientTransformationExtraArgs:
    """Apply one optimizer to linear maps, another to all other parameters."""

    def labels(params: Any) -> Any:
        return with_names(rows, lambda names, _: "linear" if matrix_of(names) else "rest", params)

    return optax.partition({"linear": linear, "rest": rest}, labels)
