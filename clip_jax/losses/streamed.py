"""The blocked and the ring form: the similarity matrix is computed in blocks and never stored.

Each device keeps its images and sees all texts, some gathered (blocked: all of them), the others
passed around a ring of devices with their statistics or, in the backward pass, their gradients.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from clip_jax.losses.forms import conclude
from clip_jax.losses.objective import Result
from clip_jax.losses.pairs import (
    Pairwise,
    Side,
    Statistics,
    compare,
    merge,
    nothing,
    rebase,
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

    def merge_home(self, x: Statistics, scale: Float[Array, ""]) -> Statistics:
        """`sum_home` for statistics."""
        if self.ring == self.shards:
            return x

        def exchange(a: Array) -> Array:
            a = a.reshape(self.shards // self.ring, -1)
            return lax.all_to_all(a, self.axes, 0, 0, axis_index_groups=self.groups, tiled=True)

        x = jax.tree.map(exchange, x)
        tops = jax.tree.map(lambda a: a.max(0), x[:2])
        sums = jax.tree.map(lambda a: a.sum(0), rebase(x, tops, scale)[2:])
        return Statistics(*tops, *sums)

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


def streamed(
    config: Pairwise,
    image: Side,
    text: Side,
    scale: Float[Array, ""],
    bias: Float[Array, ""],
    mesh: Mesh | None,
    route: Route,
) -> Result:
    """Compute the loss in memory that grows with B; the backward pass visits all blocks again."""
    batch = len(image.index)

    def local_forward(image: Side, text: Side, scale: Array, bias: Array) -> tuple[Result, Any]:
        def visit(rows: Statistics, text: Side, columns: Statistics) -> tuple[Any, Any]:
            pairs = compare(image, text, config.precision)
            summands = config.summand(pairs, scale, bias)
            rows = merge(rows, summarise(pairs, summands, scale, 1), scale)
            return rows, merge(columns, summarise(pairs, summands, scale, 0), scale)

        texts = route.gather(text)
        rows, columns = nothing(image), nothing(texts)
        rows, columns = route.around(by_blocks(visit, config.block_size), rows, texts, columns)
        columns = route.merge_home(columns, scale)
        return route.mean(conclude(config, rows, columns, scale)), (rows, columns)

    def local_backward(
        image: Side, text: Side, scale: Array, bias: Array, rows: Statistics, columns: Statistics
    ) -> tuple[Array, Array, Array, Array]:
        def visit(sums: Any, texts: Any, d_text: Array) -> tuple[Any, Array]:
            d_image, d_scale, d_bias = sums
            text, columns = texts
            pairs = compare(image, text, config.precision)
            d_logits = config.gradient(pairs, rows, columns, scale, bias)
            d_image += jnp.einsum("RC,CE->RE", d_logits, text.features, precision=config.precision)
            d_text += jnp.einsum("RC,RE->CE", d_logits, image.features, precision=config.precision)
            d_scale += (d_logits * pairs.cosine).sum()
            return (d_image, d_scale, d_bias + d_logits.sum()), d_text

        texts = route.gather((text, columns))
        sums = (jnp.zeros_like(image.features), jnp.zeros_like(scale), jnp.zeros_like(bias))
        d_text = jnp.zeros_like(texts[0].features)
        sums, d_text = route.around(by_blocks(visit, config.block_size), sums, texts, d_text)
        d_image, d_scale, d_bias = sums
        d_image, d_text = d_image * scale / batch, route.sum_home(d_text) * scale / batch
        d_scale, d_bias = route.mean((d_scale, d_bias))
        return d_image, d_text, d_scale / len(image.index), d_bias / len(image.index)

    forward, backward = local_forward, local_backward
    if mesh is not None:
        # The replicated results come from a psum, which check_vma need not verify: nothing
        # differentiates through these maps, whose derivative is `backward`.
        shard = functools.partial(
            jax.shard_map, mesh=mesh, axis_names=set(route.axes), check_vma=False
        )
        rows = P(route.axes)
        sides = (rows, rows, P(), P())
        # Outside a jit, a shard_map that leaves other axes automatic needs its own.
        forward = jax.jit(shard(local_forward, in_specs=sides, out_specs=(P(), rows)))
        backward = jax.jit(shard(local_backward, in_specs=(*sides, rows, rows), out_specs=sides))

    # The custom derivative is outside the shard_map. Inside it, the cotangent of the replicated
    # loss would reach each device divided by their number.
    @jax.custom_vjp
    def loss(image: Side, text: Side, scale: Array, bias: Array) -> Result:
        return forward(image, text, scale, bias)[0]

    def loss_fwd(*inputs: Any) -> tuple[Result, Any]:
        result, statistics = forward(*inputs)
        return result, (*inputs, *statistics)

    def loss_bwd(residuals: Any, cotangent: Any) -> tuple[Any, ...]:
        d_loss, _ = cotangent  # the metrics have no gradient
        d_image, d_text, d_scale, d_bias = (d_loss * d for d in backward(*residuals))
        none: Any = None  # integers and teachers have no gradient
        return Side(d_image, *[none] * 3), Side(d_text, *[none] * 3), d_scale, d_bias

    loss.defvjp(loss_fwd, loss_bwd)
    return loss(image, text, scale, bias)
