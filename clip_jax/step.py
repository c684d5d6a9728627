"""The training state and the one training step, pure; train, plan and bench share it."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from clip_jax import sharding
from clip_jax.losses import SigmoidConfig, SoftmaxConfig, caption_ids, contrastive_loss
from clip_jax.models.clip import CLIP, Params, join_batch_stats, l2_normalize, split_batch_stats
from clip_jax.optim import OptimConfig, make_optimizer, schedule

Batch = dict[str, Any]  # "image": uint8 [B, H, W, 3], "text": int32 [B, L]
Metrics = dict[str, Any]  # name -> scalar
LossConfig = SoftmaxConfig | SigmoidConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that training carries from step to step. The data position is `step` too."""

    step: Any  # int32 scalar: updates done, and so the number of the next batch
    params: Any  # nested dict, float32
    opt_state: Any  # Optax's


def init_state(key: Array, model: CLIP, optimizer: optax.GradientTransformation) -> State:
    """Draw parameters and start the optimizer at step 0."""
    params = model.init(key)
    trainable, _ = split_batch_stats(params)
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(trainable))


def state_shardings(model: CLIP, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Return where every array of the state lies on the mesh."""
    state = jax.eval_shape(functools.partial(init_state, jax.random.key(0), model, optimizer))
    params = sharding.param_shardings(model.config, state.params, mesh)
    opt_state = sharding.like_params(state.opt_state, params, mesh)
    return State(sharding.replicated(mesh), params, opt_state)


def compute_loss(
    trainable: Params, batch_stats: Params, batch: Batch, *, model: CLIP, loss: LossConfig,
    mesh: Mesh,
) -> tuple[Float[Array, ""], tuple[Metrics, Params]]:  # fmt: skip
    """Compute the contrastive loss of one global batch; every other pair is a negative.

    Returns the loss, and with it the metrics and BatchNorm's new statistics.
    """
    params = join_batch_stats(trainable, batch_stats)
    images = model.normalize(batch["image"])
    image_features, batch_stats = model.encode_image_train(params, images)
    text_features = model.encode_text(params, batch["text"])
    value, metrics = contrastive_loss(
        loss,
        l2_normalize(image_features),
        l2_normalize(text_features),
        jnp.exp(params["logit_scale"]),
        params.get("logit_bias"),
        caption_ids=caption_ids(batch["text"]),
        mesh=mesh,
        axes=sharding.BATCH_AXES,
    )
    return value, (metrics, batch_stats)


def train_step(
    state: State, batch: Batch, *, model: CLIP, optim: OptimConfig, steps: int, loss: LossConfig,
    mesh: Mesh,
) -> tuple[State, Metrics]:  # fmt: skip
    """Take one step: towers, global similarity, loss, gradients, update."""
    trainable, batch_stats = split_batch_stats(state.params)
    objective = jax.value_and_grad(
        functools.partial(compute_loss, model=model, loss=loss, mesh=mesh), has_aux=True
    )
    (value, (metrics, batch_stats)), grads = objective(trainable, batch_stats, batch)
    optimizer = make_optimizer(optim, steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
    trainable = cast(Params, optax.apply_updates(trainable, updates))
    cap = math.log(optim.max_logit_scale)  # the paper clips the scale to keep training stable
    trainable["logit_scale"] = jnp.minimum(trainable["logit_scale"], cap)
    metrics |= {
        "loss": value,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(trainable),
        "logit_scale": jnp.exp(trainable["logit_scale"]),
        "learning_rate": schedule(optim, steps)(state.step),
    }
    return State(state.step + 1, join_batch_stats(trainable, batch_stats), opt_state), metrics


def jit_step(
    model: CLIP, optim: OptimConfig, steps: int, loss: LossConfig, mesh: Mesh, shardings: State
) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """Compile `train_step`: the state's shardings pinned on both sides, its memory reused."""
    step = functools.partial(
        train_step, model=model, optim=optim, steps=steps, loss=loss, mesh=mesh
    )
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
