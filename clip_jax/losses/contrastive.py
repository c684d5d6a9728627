"""Contrastive losses over all pairs of the global batch, in forms for any batch size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax
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
    """A loss that compares all images with all texts."""

    name: ClassVar[str] = "contrastive"

    def check(self, model: CLIPConfig) -> None:
        """Raise InputError if the loss takes a bias that the model does not have."""
        if self.needs_bias and model.init_logit_bias is None:
            raise InputError(
                f"{type(self).__name__} needs a logit_bias, but the model has none: "
                "set model.init_logit_bias (SigLIP: -10) or choose a softmax loss."
            )

    def loss(self, x: Context) -> Result:
        """Compute the loss of the global batch."""
        scale, results = jnp.exp(x.params["logit_scale"]), []
        for name, output in self.texts.items():
            teachers = [
                (x.outputs[f"teacher{i}_image"], x.outputs[f"teacher{i}_{name}"])
                for i in range(len(self.teachers))
            ]
            ids = number_captions(x.inputs[name]) if self.mask_same_caption else None
            ids = x.inputs["class"] if self.mask_same_class else ids
            own = contrastive_loss(
                self,
                x.outputs["image"],
                x.outputs[output],
                scale,
                x.params.get("logit_bias"),
                teachers=teachers,
                caption_ids=ids,
                mesh=x.mesh,
                axes=x.axes.rows,
            )
            results.append(own)
        (loss, metrics), *others = results
        return sum((value for value, _ in others), start=loss), metrics

    def macs(self, model: CLIPConfig, batch_size: int, locked: Sequence[str]) -> int:
        """Count similarities and their two gradients, less one per locked tower, and teachers'."""
        width = model.embed_dim * (3 - len(set(locked))) + sum(x.embed_dim for x in self.teachers)
        return batch_size * batch_size * width * len(self.texts)

    def chosen_form(self, model: CLIPConfig, batch_size: int, shards: int) -> Form:
        """Return the form that is used, with `auto` resolved."""
        widths = [x.embed_dim + self.needs_bias for x in self.teachers]
        return choose_form(self, batch_size, model.embed_dim, shards, widths)


def contrastive_loss(
    config: Contrastive,
    image_features: Float[Array, "B E"],
    text_features: Float[Array, "B E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    *,
    teachers: Sequence[tuple[Float[Array, "B _"], Float[Array, "B _"]]] = (),
    caption_ids: Int[Array, " B"] | None = None,
    mesh: Mesh | None = None,
    axes: tuple[str, ...] = (),
) -> Result:
    """Compute loss and metrics of L2-normalised embeddings; pair i is row i of both.

    Embeddings are global arrays whose first dim is sharded over the mesh axes `axes` (none: one
    device). `logit_scale` is the factor itself, not its logarithm. The softmax ignores
    `logit_bias`, which cancels in it; the sigmoid needs it. `teachers` has the embeddings of
    images and texts by each teacher, as in `Side`; they get no gradient. `caption_ids` (see
    `same_caption`) or the classes are required by a mask and ignored without. Metrics:
    `image_to_text_accuracy` and `text_to_image_accuracy`, top 1 in the batch, where k-fold ties
    count 1/k.

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
    ids = caption_ids if config.mask_same_caption or config.mask_same_class else None
    of_images, of_texts = (
        tuple(jax.lax.stop_gradient(pair[i]) for pair in teachers) for i in (0, 1)
    )
    image = Side(image_features, index, ids, of_images)
    text = Side(text_features, index, ids, of_texts)
    mesh = mesh if shards > 1 else None
    widths = [x.shape[1] for x in of_texts]
    form = choose_form(config, batch, image_features.shape[1], shards, widths)
    if form == "dense":
        return dense(config, image, text, logit_scale, logit_bias, mesh, axes)
    ring = 1 if form == "blocked" or mesh is None else devices_per_slice(mesh, axes)
    route = Route(axes, shards, ring)
    return streamed(config, image, text, logit_scale, logit_bias, mesh, route)


def choose_form(
    config: Contrastive, batch: int, embed_dim: int, shards: int, teachers: Sequence[int] = ()
) -> Form:
    """Resolve `auto`: dense if a device's logits fit the budget, blocked if embeddings do, with
    those of teachers of the given widths."""
    budget = config.budget_mib * 2**20 / 4  # float32s
    if config.form != "auto":
        return config.form
    if batch**2 // shards * (1 + len(teachers)) <= budget:
        return "dense"
    width = embed_dim + sum(teachers)
    return "blocked" if batch * width <= budget or shards == 1 else "ring"


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
