"""The dense form of the losses, and the last step of every form."""

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from clip_jax.losses.objective import Result
from clip_jax.losses.pairs import Pairs, Pairwise, Side, Statistics, accuracy, compare, summarise


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
    config: Pairwise,
    image: Side,
    text: Side,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    mesh: Mesh | None,
    axes: tuple[str, ...],
) -> Result:
    """Compute each device's rows of the logits, [B / devices, B], at once; JAX differentiates."""

    def gather(x: Float[Array, "b E"]) -> Float[Array, "B E"]:
        # The derivative is a reduce-scatter to the texts' own devices, which receive half of what
        # an all-reduce sends. TPUs have it along one axis of a mesh, not along two at once.
        for dim, axis in enumerate(axes):
            x = jax.lax.all_gather(x, axis, axis=dim)
        return x.reshape(-1, x.shape[-1])

    def local(image: Side, text: Side) -> Pairs:
        features, teachers = jax.tree.map(gather, (text.features, text.teachers))
        return compare(image, text._replace(features=features, teachers=teachers), config.precision)

    if mesh is None:
        pairs = compare(image, text, config.precision)
    else:
        rows = P(axes)
        sides = rows, Side._make((rows, P(), P(), rows))
        pairs = jax.shard_map(local, mesh=mesh, in_specs=sides, out_specs=rows)(image, text)
    summands = config.summand(pairs, scale, bias)
    rows, columns = summarise(pairs, summands, scale, 1), summarise(pairs, summands, scale, 0)
    return conclude(config, rows, columns, scale)
