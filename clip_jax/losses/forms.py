"""The dense form of the losses, and the last step of every form."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from clip_jax.losses.objective import Result
from clip_jax.losses.pairs import Pairwise, Side, Statistics, accuracy, compare, summarise


def conclude(
    config: Pairwise, image: Statistics, text: Statistics, scale: Float[Array, ""]
) -> Result:
    """Average loss and accuracies over pairs, from the statistics of their images and texts."""
    metrics = {
        "image_to_text_accuracy": accuracy(image).mean(),
        "text_to_image_accuracy": accuracy(text).mean(),
    }
    return config.losses(image, text, scale).mean(), jax.lax.stop_gradient(metrics)


def dense(
    config: Pairwise, image: Side, text: Side, scale: Float[Array, ""], bias: Float[Array, ""],
    mesh: Mesh | None, axes: tuple[str, ...],
) -> Result:  # fmt: skip
    """Compute each device's rows of the logits, [B / devices, B], at once; JAX differentiates."""
    if mesh is not None:

        def constrain(x: Any, spec: P) -> Any:
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

        image, text = constrain(image, P(axes)), constrain(text, P())
    pairs = compare(image, text, config.precision)
    if mesh is not None:
        pairs = constrain(pairs, P(axes, None))
    summands = config.summand(pairs, scale, bias)
    rows, columns = summarise(pairs, summands, scale, 1), summarise(pairs, summands, scale, 0)
    return conclude(config, rows, columns, scale)
