"""Contrastive losses whose negatives are the global batch, in forms that fit any batch."""

import math

import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from clip_jax.losses.captions import caption_ids
from clip_jax.losses.forms import Config, Result, dense
from clip_jax.losses.pairs import Side
from clip_jax.losses.sigmoid import SigmoidConfig
from clip_jax.losses.softmax import SoftmaxConfig

__all__ = ["SigmoidConfig", "SoftmaxConfig", "caption_ids", "contrastive_loss"]


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

    Raises ValueError if what the config needs is missing, or B doesn't divide by the shards.
    """
    if isinstance(config, SoftmaxConfig):
        logit_bias = jnp.zeros_like(logit_scale)
    if logit_bias is None:
        raise ValueError(
            "SigmoidConfig needs a logit_bias, and the model has none: "
            "set model.init_logit_bias (SigLIP: -10) or choose SoftmaxConfig."
        )
    if config.mask_same_caption and caption_ids is None:
        raise ValueError("loss.mask_same_caption=True needs caption_ids, and got None.")
    batch = len(image_features)
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)
    if batch % shards:
        raise ValueError(
            f"A batch of {batch} does not divide into {shards} shards (mesh axes {axes}): "
            "change batch_size or the mesh."
        )
    index = jnp.arange(batch)
    ids = caption_ids if config.mask_same_caption else None
    image, text = Side(image_features, index, ids), Side(text_features, index, ids)
    return dense(config, image, text, logit_scale, logit_bias, mesh if shards > 1 else None, axes)
