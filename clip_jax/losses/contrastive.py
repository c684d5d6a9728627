"""Contrastive losses over all pairs of the global batch, in forms for any batch size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_jax.errors import InputError
from clip_jax.losses.forms import dense
from clip_jax.losses.objective import Context, Result
from clip_jax.losses.pairs import Form, Pairwise, Side
from clip_jax.losses.same_caption import caption_ids as number_captions
from clip_jax.losses.streamed import Route, streamed
from clip_jax.models.clip import CLIPConfig


@dataclass(frozen=True, kw_only=True)
class Contrastive(Pairwise):
    """A loss that compares all images with all texts; every other pair is a negative."""

    name: ClassVar[str] = "contrastive"

    def check(self, model: CLIPConfig) -> None:
        """Raise InputError if the loss takes a bias that the model does not have."""
        if self.needs_bias and model.init_logit_bias is None:
            raise InputError(
                f"{type(self).__name__} needs a logit_bias, but the model has none: "
                "set model.init_logit_bias (SigLIP: -10) or choose SoftmaxConfig."
            )

    def loss(self, x: Context) -> Result:
        """Compute the loss of the global batch."""
        image, text = x.outputs["image"], x.outputs["text"]
        scale, bias = jnp.exp(x.params["logit_scale"]), x.params.get("logit_bias")
        ids = number_captions(x.inputs["text"]) if self.mask_same_caption else None
        return contrastive_loss(
            self, image, text, scale, bias, caption_ids=ids, mesh=x.mesh, axes=x.axes.rows
        )

    def macs(self, model: CLIPConfig, batch_size: int, locked: Sequence[str]) -> int:
        """Count the similarity matrix and its two gradients; a locked tower saves one of them."""
        return batch_size * batch_size * model.embed_dim * (3 - len(set(locked)))

    def chosen_form(self, model: CLIPConfig, batch_size: int, shards: int) -> Form:
        """Return the form that is used, with `auto` resolved."""
        return choose_form(self, batch_size, model.embed_dim, shards)


def contrastive_loss(
    config: Contrastive,
    image_features: Float[Array, "B E"],
    text_features: Float[Array, "B E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    *,
    caption_ids: Int[Array, " B"] | None = None,
    mesh: Mesh | None = None,
    axes: tuple[str, ...] = (),
) -> Result:
    """Compute loss and metrics of L2-normalised embeddings; pair i is row i of both.

    Embeddings are global arrays whose first dim is sharded over the mesh axes `axes` (none: one
    device). `logit_scale` is the factor itself, not its logarithm. The softmax ignores
    `logit_bias`, which cancels in it; the sigmoid needs it. `caption_ids` (see `same_caption`)
    is required with `mask_same_caption` and ignored without. Metrics: `image_to_text_accuracy`
    and `text_to_image_accuracy`, top 1 in the batch, where k-fold ties count 1/k.

    Raises InputError if B is not a multiple of the number of shards.
    """
    if not config.needs_bias:
        logit_bias = jnp.zeros_like(logit_scale)
    if logit_bias is None:
        raise ValueError(f"{type(config).__name__} needs logit_bias, but got None.")
    if config.mask_same_caption and caption_ids is None:
        raise ValueError("mask_same_caption=True needs caption_ids, but got None.")
    batch = len(image_features)
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    if batch % shards:
        raise InputError(
            f"A batch of {batch} does not divide into {shards} shards (mesh axes {axes}): "
            "change batch_size or the mesh."
        )
    index = jnp.arange(batch)
    ids = caption_ids if config.mask_same_caption else None
    image, text = Side(image_features, index, ids), Side(text_features, index, ids)
    mesh = mesh if shards > 1 else None
    form = choose_form(config, batch, image_features.shape[1], shards)
    if form == "dense":
        return dense(config, image, text, logit_scale, logit_bias, mesh, axes)
    ring = 1 if form == "blocked" or mesh is None else devices_per_slice(mesh, axes)
    route = Route(axes, shards, ring)
    return streamed(config, image, text, logit_scale, logit_bias, mesh, route)


def choose_form(config: Contrastive, batch: int, embed_dim: int, shards: int) -> Form:
    """Resolve `auto`: dense if a device's logits fit the budget, blocked if embeddings do."""
    budget = config.budget_mib * 2**20 / 4  # float32s
    if config.form != "auto":
        return config.form
    if batch**2 // shards <= budget:
        return "dense"
    return "blocked" if batch * embed_dim <= budget or shards == 1 else "ring"


def devices_per_slice(mesh: Mesh, axes: tuple[str, ...]) -> int:
    """Count the devices along `axes` within a slice, with fast links; 1 if slices are interleaved.

    Devices of one TPU slice share a `slice_index`; other backends have none and count as one.
    """
    others = tuple(axis for axis in mesh.axis_names if axis not in axes)
    order = [mesh.axis_names.index(axis) for axis in (*axes, *others)]
    shards = math.prod(mesh.shape[axis] for axis in axes)
    devices = mesh.devices.transpose(order).reshape(shards, -1)
    slices = [[getattr(device, "slice_index", 0) for device in row] for row in devices]
    ring = slices.count(slices[0])
    in_order = all(row == slices[i - i % ring] for i, row in enumerate(slices))
    return ring if shards % ring == 0 and in_order else 1
