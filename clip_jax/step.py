"""The training state and the one training step, pure; train, plan and bench share it."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Key

from clip_jax import sharding
from clip_jax.losses import (
    SigmoidConfig,
    SoftmaxConfig,
    cached_value_and_grad,
    caption_ids,
    contrastive_loss,
)
from clip_jax.models.clip import CLIP, Params, join_batch_stats, l2_normalize, split_batch_stats
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import TOWERS, GuardState, OptimConfig, Tower, make_optimizer, schedule
from clip_jax.sharding import AnyMesh

Batch = dict[str, Any]  # "image": uint8 [B, H, W, 3], "text": int32 [B, L]
Metrics = dict[str, Any]  # name -> scalar
Features = tuple[Float[Array, "B E"], Float[Array, "B E"]]
LossConfig = SoftmaxConfig | SigmoidConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that training carries from step to step. The data position is `step` too."""

    step: Any  # int32 scalar: updates done, and so the number of the next batch
    params: Any  # nested dict, float32
    opt_state: Any  # Optax's


def init_state(
    key: Array, model: CLIP, optimizer: optax.GradientTransformation, given: Params | None = None
) -> State:
    """Draw parameters, except those given, and start the optimizer at step 0."""
    params = model.init(key) | (given or {})
    trainable, _ = split_batch_stats(params)
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(trainable))


def state_shardings(model: CLIP, optimizer: optax.GradientTransformation, mesh: AnyMesh) -> State:
    """Return where every array of the state lies on the mesh."""
    state = jax.eval_shape(functools.partial(init_state, jax.random.key(0), model, optimizer))
    params = sharding.param_shardings(model.config, state.params, mesh)
    opt_state = sharding.like_params(state.opt_state, params, mesh)
    return State(sharding.replicated(mesh), params, opt_state)


def encode(
    trainable: Params, batch_stats: Params, batch: Batch, *, model: CLIP, mesh: Mesh,
    locked: tuple[Tower, ...] = (), key: Array | None = None,
) -> tuple[Features, Params]:  # fmt: skip
    """Embed both sides of a batch at unit length; return them and BatchNorm's new statistics.

    With `key` patches are dropped: a pair's `row` in the global batch decides which, so that
    neither the mesh nor the number of chunks matters.
    """
    layout = sharding.layout(mesh, model.config.attention)
    model = replace(model, layout=layout)
    frozen = {TOWERS[tower]: jax.lax.stop_gradient(trainable[TOWERS[tower]]) for tower in locked}
    params = join_batch_stats(trainable | frozen, batch_stats)
    images = model.normalize(batch["image"])
    if "image" in locked:  # as when it is used: all patches, BatchNorm's running statistics
        image_features = model.encode_image(params, images)
    else:
        keys = None if key is None else _row_keys(key, layout.place(batch["row"]))
        image_features, batch_stats = model.encode_image_train(params, images, keys)
    text_features = model.encode_text(params, batch["text"])
    place = layout.place
    return (place(l2_normalize(image_features)), place(l2_normalize(text_features))), batch_stats


def _row_keys(key: Array, rows: Int[Array, " B"]) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def compare(
    trainable: Params, image_features: Float[Array, "B E"], text_features: Float[Array, "B E"], *,
    text: Int[Array, "B L"], loss: LossConfig, mesh: Mesh,
) -> tuple[Float[Array, ""], Metrics]:  # fmt: skip
    """Compute the contrastive loss of one global batch; every other pair is a negative."""
    return contrastive_loss(
        loss,
        image_features,
        text_features,
        jnp.exp(trainable["logit_scale"]),
        trainable.get("logit_bias"),
        caption_ids=caption_ids(text),
        mesh=mesh,
        axes=sharding.BATCH_AXES,
    )


def compute_loss(
    trainable: Params, batch_stats: Params, batch: Batch, *, model: CLIP, loss: LossConfig,
    mesh: Mesh, locked: tuple[Tower, ...] = (), key: Array | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, Params]]:  # fmt: skip
    """Compute the loss of one global batch, and with it metrics and BatchNorm's new statistics."""
    features, batch_stats = encode(
        trainable, batch_stats, batch, model=model, mesh=mesh, locked=locked, key=key
    )
    value, metrics = compare(trainable, *features, text=batch["text"], loss=loss, mesh=mesh)
    return value, (metrics, batch_stats)


def train_step(
    state: State, batch: Batch, *, model: CLIP, optim: OptimConfig, steps: int, loss: LossConfig,
    mesh: Mesh, accumulation: int = 1, seed: int = 0,
) -> tuple[State, Metrics]:  # fmt: skip
    """Take one step: towers, global similarity, loss, gradients, update.

    With `accumulation` the towers see the batch in that many chunks, one after the other, in the
    memory of one; the gradients are those of the whole. `seed` is that of the patch dropout.
    """
    trainable, batch_stats = split_batch_stats(state.params)
    vision = model.config.vision
    key = None
    if isinstance(vision, ViTConfig) and vision.patch_dropout:
        # Threefry, whatever the default: the rows' keys must give the same under vmap.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.step)
        batch = batch | {"row": jnp.arange(len(batch["text"]))}
    options: dict[str, Any] = {"model": model, "mesh": mesh, "locked": optim.locked, "key": key}
    if accumulation == 1:
        objective = jax.value_and_grad(
            functools.partial(compute_loss, loss=loss, **options), has_aux=True
        )
        (value, (metrics, batch_stats)), grads = objective(trainable, batch_stats, batch)
    else:
        group = vision.batch_norm_group if isinstance(vision, ResNetConfig) else None
        (value, (metrics, batch_stats)), grads = cached_value_and_grad(
            lambda params, chunk, _: encode(params, batch_stats, chunk, **options),
            functools.partial(compare, text=batch["text"], loss=loss, mesh=mesh),
            trainable,
            batch,
            accumulation,
            jax.random.key(0),  # of no use: a pair's own row decides what is dropped
            group_size=group or 1,
        )
    optimizer = make_optimizer(optim, steps)
    updates, opt_state = optimizer.update(grads, state.opt_state, trainable)
    trainable = cast(Params, optax.apply_updates(trainable, updates))
    cap = math.log(optim.max_logit_scale)  # the paper clips the scale to keep training stable
    trainable["logit_scale"] = jnp.minimum(trainable["logit_scale"], cap)
    updated = state.step
    if isinstance(opt_state, GuardState):
        done = opt_state.skipped == state.opt_state.skipped
        _, before = split_batch_stats(state.params)
        batch_stats = jax.tree.map(lambda a, b: jnp.where(done, a, b), batch_stats, before)
        metrics |= {
            "skipped_updates": opt_state.skipped, "skipped_in_a_row": opt_state.skipped_in_a_row
        }  # fmt: skip
        updated = updated - opt_state.skipped
    metrics |= {
        "loss": value,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(trainable),
        "logit_scale": jnp.exp(trainable["logit_scale"]),
        "learning_rate": schedule(optim, steps)(updated),
    }
    return State(state.step + 1, join_batch_stats(trainable, batch_stats), opt_state), metrics


def jit_step(
    model: CLIP, optim: OptimConfig, steps: int, loss: LossConfig, mesh: Mesh, shardings: State,
    *, accumulation: int = 1, seed: int = 0,
) -> Callable[[State, Batch], tuple[State, Metrics]]:  # fmt: skip
    """Compile `train_step`: the state's shardings pinned on both sides, its memory reused."""
    step = functools.partial(
        train_step, model=model, optim=optim, steps=steps, loss=loss, mesh=mesh,
        accumulation=accumulation, seed=seed,
    )  # fmt: skip
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
