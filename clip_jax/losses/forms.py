"""The dense form of the losses, and the last step of every form."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from clip_jax.losses.objective import AnyMesh, Result
from clip_jax.losses.pairs import Pairs, Precision, Side, compare
from clip_jax.losses.prefixes import at_width
from clip_jax.losses.sums import NEAR, Statistics, Sums, accuracy, evaluate, summarise, weighted


@dataclass(frozen=True)
class PairLoss:
    """What a form computes; `Contrastive` documents the functions."""

    sums: Callable[[Float[Array, ""], Float[Array, ""]], Sums]  # of scale and bias
    losses: Callable[..., Any]
    gradient: Callable[..., Float[Array, "R C"]] | None  # None: JAX derives it
    precision: Precision
    widths: tuple[int, ...]
    block_size: int

    def compare(self, image: Side, text: Side) -> Pairs:
        """Compare every image with every text."""
        return compare(image, text, self.precision, self.widths)

    def value(
        self, image: Statistics, text: Statistics, scale: Float[Array, ""], bias: Float[Array, ""]
    ) -> Float[Array, ""]:
        """Average each array of losses, and add the averages."""
        first, *others = jax.tree.leaves(self.losses(image, text, scale, bias))
        return sum((x.mean() for x in others), start=first.mean())

    def conclude(
        self, image: Statistics, text: Statistics, scale: Float[Array, ""], bias: Float[Array, ""]
    ) -> Result:
        """Return loss and accuracies from the statistics of all images and texts."""
        metrics = {}
        for width in (None, *self.widths):
            of_width, distance = ("", 0.0) if width is None else (f"_{width}", NEAR)
            of_image, of_text = at_width(image, width), at_width(text, width)
            of_images, of_texts = accuracy(of_image, distance), accuracy(of_text, distance)
            of_texts = weighted(of_texts, of_text, len(of_images))
            metrics[f"image_to_text_accuracy{of_width}"] = of_images.mean()
            metrics[f"text_to_image_accuracy{of_width}"] = of_texts.mean()
        return self.value(image, text, scale, bias), jax.lax.stop_gradient(metrics)


def dense(
    loss: PairLoss,
    image: Side,
    text: Side,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    mesh: AnyMesh | None,
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
        return loss.compare(image, text._replace(features=features, teachers=teachers))

    if mesh is None:
        pairs = loss.compare(image, text)
    else:
        rows: Any = P(axes)
        all_texts: Any = P()
        of_text = Side(*[all_texts] * len(Side._fields))._replace(features=rows, teachers=rows)
        of_pairs = Pairs(*[rows] * len(Pairs._fields))
        of_pairs = of_pairs._replace(text=all_texts, text_weight=all_texts)
        compare = jax.shard_map(local, mesh=mesh, in_specs=(rows, of_text), out_specs=of_pairs)
        pairs = compare(image, text)
    sums = loss.sums(scale, bias)
    values = evaluate(sums, pairs)
    rows, columns = summarise(sums, pairs, values, 1), summarise(sums, pairs, values, 0)
    return loss.conclude(rows, columns, scale, bias)
