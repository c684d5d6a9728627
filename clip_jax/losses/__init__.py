"""Contrastive losses whose negatives are the global batch, in forms that fit any batch."""

import math

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_jax.errors import InputError
from clip_jax.losses.accumulation import cached_value_and_grad
from clip_jax.losses.caption import Axes, CaptionConfig, caption_loss, count_labels
from clip_jax.losses.forms import Config, Result, dense
from clip_jax.losses.pairs import Form, Side
from clip_jax.losses.same_caption import caption_ids
from clip_jax.losses.sigmoid import SigmoidConfig
from clip_jax.losses.softmax import SoftmaxConfig
from clip_jax.losses.streamed import Route, streamed

__all__ = [
    "Axes",
    "CaptionConfig",
    "SigmoidConfig",
    "SoftmaxConfig",
    "cached_value_and_grad",
    "caption_ids",
    "caption_loss",
    "choose_form",
    "contrastive_loss",
    "count_labels",
]


def contrastive_loss(
    config: Config,
    image_features: Float[Array, "B E"],
    text_features: Float[Array, "B E"],
    logit_scale: Float[Array, ""],
    logit_bias: Float[Array, ""] | None = None,
    *,
    caption_ids: Int[Array, " B"] | None = None,
    mesh: Mesh | None = None,
    axes: tuple[str, ...] = (),
) -> Result:
    """Compute loss and metrics of L2-normalised features; pair i is row i of both.

    Features are global arrays whose first dim is sharded over the mesh axes `axes` (none: one
    device). `logit_scale` is the factor itself, not its logarithm. The softmax ignores
    `logit_bias`, which cancels in it; the sigmoid needs it. `caption_ids` (see the function of that
    name) is needed by `mask_same_caption` and ignored without. Metrics:
    `image_to_text_accuracy` and `text_to_image_accuracy`, top 1 in the batch, k-fold ties 1/k.

    Raises InputError if what the config needs is missing, or B doesn't divide by the shards.
    """
    if isinstance(config, SoftmaxConfig):
        logit_bias = jnp.zeros_like(logit_scale)
    if logit_bias is None:
        raise InputError(
            "SigmoidConfig needs a logit_bias, and the model has none: "
            "set model.init_logit_bias (SigLIP: -10) or choose SoftmaxConfig."
        )
    if config.mask_same_caption and caption_ids is None:
        raise ValueError("loss.mask_same_caption=True needs caption_ids, and got None.")
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


def choose_form(config: Config, batch: int, embed_dim: int, shards: int) -> Form:
    """Resolve `auto`: dense while a device's logits fit the budget, then blocked, else ring."""
    budget = config.budget_mib * 2**20 / 4  # float32s
    if config.form != "auto":
        return config.form
    if batch**2 // shards <= budget:
        return "dense"
    return "blocked" if batch * embed_dim <= budget or shards == 1 else "ring"


def devices_per_slice(mesh: Mesh, axes: tuple[str, ...]) -> int:
    """Count the neighbours along `axes` that fast links join; 1 if slices are not in order.

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
