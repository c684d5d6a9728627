"""The blocked and the ring form: the similarity matrix is computed in blocks and never stored.

Each device keeps its images and sees all texts, some gathered (blocked: all of them), the others
passed around a ring of devices with their statistics or, in the backward pass, their gradients.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from clip_jax.losses.forms import PairLoss
from clip_jax.losses.objective import AnyMesh, Result
from clip_jax.losses.pairs import Side
from clip_jax.losses.sums import (
    Statistics,
    Sums,
    contribution,
    evaluate,
    maxima,
    merge,
    merge_all,
    rebase,
    start,
    summarise,
)

# images, columns = visit(images, texts, columns): compare this device's images with some texts,
# and update the statistics or gradients of both.
Visit = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Route:
    """How texts reach the devices along `axes`: in rings of `ring`, gathered across the rings."""

    axes: tuple[str, ...]
    shards: int  # devices along `axes`
    ring: int  # neighbours in one ring; 1: everything is gathered, `shards`: nothing is

    @property
    def groups(self) -> list[list[int]]:
        """The devices at the same position of every ring, which exchange their texts."""
        return [list(range(position, self.shards, self.ring)) for position in range(self.ring)]

    def gather(self, x: Any) -> Any:
        """Gather the texts at the same position of all rings, [B / ring]."""
        if self.ring == self.shards:
            return x

        def collect(a: Array) -> Array:
            return lax.all_gather(a, self.axes, axis_index_groups=self.groups, tiled=True)

        return jax.tree.map(collect, x)

    def sum_home(self, x: Float[Array, "B E"]) -> Float[Array, "b E"]:
        """Sum gathered texts' values over all rings; each device keeps those of its own texts."""
        if self.ring == self.shards:
            return x
        return lax.psum_scatter(x, self.axes, axis_index_groups=self.groups, tiled=True)

    def merge_home(self, sums: Sums, x: Statistics) -> Statistics:
        """`sum_home` for statistics."""
        if self.ring == self.shards:
            return x

        def exchange(a: Array) -> Array:
            a = a.reshape(self.shards // self.ring, -1)
            return lax.all_to_all(a, self.axes, 0, 0, axis_index_groups=self.groups, tiled=True)

        return merge_all(sums, jax.tree.map(exchange, x))

    def mean(self, x: Any) -> Any:
        """Average over all devices."""
        return lax.pmean(x, self.axes) if self.shards > 1 else x

    def pass_on(self, x: Any) -> Any:
        """Send to the next device of the ring and receive from the previous one."""
        hops = [(i, i - i % self.ring + (i + 1) % self.ring) for i in range(self.shards)]
        return jax.tree.map(lambda a: lax.ppermute(a, self.axes, hops), x)

    def around(self, visit: Visit, images: Any, texts: Any, columns: Any) -> tuple[Any, Any]:
        """Visit every text of the ring with this device's images; a text's results return home."""
        if self.ring == 1:
            return visit(images, texts, columns)

        def turn(state: Any, _: None) -> tuple[Any, None]:
            images, texts, columns = state
            coming = self.pass_on(texts)  # waits for nothing computed here, so both can overlap
            images, columns = visit(images, texts, columns)
            return (images, coming, self.pass_on(columns)), None

        (images, _, columns), _ = lax.scan(turn, (images, texts, columns), length=self.ring)
        return images, columns


def by_blocks(visit: Visit, size: int) -> Visit:
    """Return a visit that handles any number of texts, `size` at a time."""

    def visit_all(images: Any, texts: Any, columns: Any) -> tuple[Any, Any]:
        length = len(jax.tree.leaves(columns)[0])
        cut = length - length % size
        parts = []
        if cut:
            blocks = jax.tree.map(
                lambda a: a[:cut].reshape(-1, size, *a.shape[1:]), (texts, columns)
            )
            images, part = lax.scan(lambda carry, block: visit(carry, *block), images, blocks)
            parts.append(jax.tree.map(lambda a: a.reshape(cut, *a.shape[2:]), part))
        if cut < length:
            images, part = visit(images, *jax.tree.map(lambda a: a[cut:], (texts, columns)))
            parts.append(part)
        return images, jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    return visit_all


class Gradients(NamedTuple):
    """Derivatives of the loss, in which blocks are added up."""

    image: Float[Array, "b E"]
    scale: Float[Array, ""]
    bias: Float[Array, ""]


def streamed(
    loss: PairLoss,
    image: Side,
    text: Side,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    mesh: AnyMesh | None,
    route: Route,
) -> Result:
    """Compute the loss in memory that grows with B; the backward pass visits all blocks again."""
    forward = functools.partial(_forward, loss, route)
    backward = functools.partial(_derived if loss.gradient is None else _analytical, loss, route)
    if mesh is not None:
        # The replicated results come from a psum, which check_vma need not verify: nothing
        # differentiates through these maps, whose derivative is `backward`.
        shard = functools.partial(
            jax.shard_map, mesh=mesh, axis_names=set(route.axes), check_vma=False
        )
        rows = P(route.axes)
        sides = (rows, rows, P(), P())
        # Outside a jit, a shard_map that leaves other axes automatic needs its own.
        forward = jax.jit(shard(forward, in_specs=sides, out_specs=(P(), rows)))
        backward = jax.jit(shard(backward, in_specs=(*sides, rows, rows), out_specs=sides))

    # The custom derivative is outside the shard_map. Inside it, the cotangent of the replicated
    # loss would reach each device divided by their number.
    @jax.custom_vjp
    def value(image: Side, text: Side, scale: Array, bias: Array) -> Result:
        return forward(image, text, scale, bias)[0]

    def value_fwd(*inputs: Any) -> tuple[Result, Any]:
        result, statistics = forward(*inputs)
        return result, (*inputs, *statistics)

    def value_bwd(residuals: Any, cotangent: Any) -> tuple[Any, ...]:
        d_loss, _ = cotangent  # the metrics have no gradient
        d_image, d_text, d_scale, d_bias = (d_loss * d for d in backward(*residuals))
        none: Any = None  # integers, teachers and inputs have no gradient
        others = [none] * (len(Side._fields) - 1)
        return Side(d_image, *others), Side(d_text, *others), d_scale, d_bias

    value.defvjp(value_fwd, value_bwd)
    return value(image, text, scale, bias)


def _forward(
    loss: PairLoss, route: Route, image: Side, text: Side, scale: Array, bias: Array
) -> tuple[Result, tuple[Statistics, Statistics]]:
    """Return loss and metrics, and the statistics of this device's images and texts."""
    sums = loss.sums(scale, bias)

    def visit(rows: Statistics, text: Side, columns: Statistics) -> tuple[Any, Any]:
        pairs = loss.compare(image, text)
        values = evaluate(sums, pairs)
        rows = merge(sums, rows, summarise(sums, pairs, values, 1))
        return rows, merge(sums, columns, summarise(sums, pairs, values, 0))

    texts = route.gather(text)
    rows, columns = start(sums, image), start(sums, texts)
    rows, columns = route.around(by_blocks(visit, loss.block_size), rows, texts, columns)
    columns = route.merge_home(sums, columns)
    return route.mean(loss.conclude(rows, columns, scale, bias)), (rows, columns)


def _analytical(
    loss: PairLoss,
    route: Route,
    image: Side,
    text: Side,
    scale: Array,
    bias: Array,
    rows: Statistics,
    columns: Statistics,
) -> tuple[Array, Array, Array, Array]:
    """Return the derivatives by the embeddings, scale and bias from those by the logits."""
    gradient: Any = loss.gradient

    def visit(sums: Gradients, texts: Any, d_text: Array) -> tuple[Gradients, Array]:
        text, columns = texts
        pairs = loss.compare(image, text)
        d_logits = gradient(pairs, rows, columns, scale, bias)
        d_image = jnp.einsum("RC,CE->RE", d_logits, text.features, precision=loss.precision)
        d_text += jnp.einsum("RC,RE->CE", d_logits, image.features, precision=loss.precision)
        d_scale = (d_logits * pairs.cosine).sum()
        return jax.tree.map(jnp.add, sums, Gradients(d_image, d_scale, d_logits.sum())), d_text

    texts = route.gather((text, columns))
    zeros = jax.tree.map(jnp.zeros_like, Gradients(image.features, scale, bias))
    d_text = jnp.zeros_like(texts[0].features)
    sums, d_text = route.around(by_blocks(visit, loss.block_size), zeros, texts, d_text)
    local, batch = len(image.ids), len(image.ids) * route.shards
    d_image, d_text = sums.image * scale / batch, route.sum_home(d_text) * scale / batch
    d_scale, d_bias = route.mean((sums.scale, sums.bias))
    return d_image, d_text, d_scale / local, d_bias / local


def _derived(
    loss: PairLoss,
    route: Route,
    image: Side,
    text: Side,
    scale: Array,
    bias: Array,
    rows: Statistics,
    columns: Statistics,
) -> tuple[Array, Array, Array, Array]:
    """Return the derivatives by the embeddings, scale and bias, which JAX derives.

    With L the loss, S the statistics and s those of a block, dL/dx = ∂L/∂S · Σ ∂s/∂x + ∂L/∂x.
    """

    def value(rows: Statistics, columns: Statistics, scale: Array, bias: Array) -> Array:
        # Sums relative to a maximum that has a gradient depend on it.
        sums = loss.sums(scale, bias)
        moved = [
            rebase(sums, x | jax.lax.stop_gradient(tops), tops)
            for x in (rows, columns)
            for tops in [{name: x[name] for name in maxima(sums)}]
        ]
        return loss.value(*moved, scale, bias)

    d_rows, d_columns, *d_scalars = jax.grad(value, (0, 1, 2, 3))(rows, columns, scale, bias)

    def visit(sums: Gradients, texts: Any, d_text: Array) -> tuple[Gradients, Array]:
        text, columns, d_columns = texts

        def of_block(a: Array, b: Array, scale: Array, bias: Array) -> list[Statistics]:
            pairs = loss.compare(image._replace(features=a), text._replace(features=b))
            entries = loss.sums(scale, bias)
            return [contribution(entries, pairs, x, y) for x, y in ((rows, 1), (columns, 0))]

        added, pull_back = jax.vjp(of_block, image.features, text.features, scale, bias)
        cotangents = [
            {name: d[name] for name in x} for x, d in zip(added, (d_rows, d_columns), strict=True)
        ]
        d_image, d_block, d_scale, d_bias = pull_back(cotangents)
        return jax.tree.map(jnp.add, sums, Gradients(d_image, d_scale, d_bias)), d_text + d_block

    texts = route.gather((text, columns, d_columns))
    begin = Gradients(jnp.zeros_like(image.features), *d_scalars)
    d_text = jnp.zeros_like(texts[0].features)
    sums, d_text = route.around(by_blocks(visit, loss.block_size), begin, texts, d_text)
    d_scale, d_bias = route.mean((sums.scale, sums.bias))
    return sums.image / route.shards, route.sum_home(d_text) / route.shards, d_scale, d_bias
