"""The training state, its birth on a mesh, and the one training step, pure.

Train, plan, bench and tests share all three: what one compiles is what the others run.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Key

from clip_jax import processes, sharding
from clip_jax.losses import (
    Axes,
    CaptionConfig,
    SigmoidConfig,
    SoftmaxConfig,
    cached_value_and_grad,
    caption_ids,
    caption_loss,
    contrastive_loss,
    count_labels,
)
from clip_jax.models.clip import (
    CLIP,
    CLIPConfig,
    Params,
    join_batch_stats,
    l2_normalize,
    split_batch_stats,
)
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import TOWERS, GuardState, OptimConfig, Tower, make_optimizer, schedule
from clip_jax.sharding import AnyMesh

# "image": uint8 [B, H, W, 3], "text": int32 [B, L], "rate": float32, the step's learning rate
Inputs = dict[str, Any]
Metrics = dict[str, Any]  # name -> scalar
# Of images and of texts; with a decoder also what writing each text cost.
Features = tuple[Float[Array, "B ..."], ...]
LossConfig = SoftmaxConfig | SigmoidConfig


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that training carries from step to step. The data position is `step` too."""

    step: Any  # int32 scalar: updates done, and so the number of the next batch
    params: Any  # nested dict, float32
    opt_state: Any  # Optax's


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides an update, the data and the mesh aside."""

    model: CLIPConfig
    loss: LossConfig
    optim: OptimConfig
    caption: CaptionConfig = CaptionConfig()  # read where the model has a decoder
    steps: int  # of the whole run: the schedule's end
    batch_size: int  # pairs over all devices
    accumulation: int = 1
    seed: int = 0  # of the parameters, and of what training drops


class Program:
    """A recipe on a mesh: where its arrays lie, and the two functions compiled for them.

    `state` and `batch` are shapes that know their shardings (see `shapes`). Nothing is computed
    or compiled before `init` or `step` is called.
    """

    def __init__(self, recipe: Recipe, mesh: Mesh) -> None:
        self.recipe, self.mesh = recipe, mesh
        self.model = CLIP(recipe.model)
        self.state, self.batch = shapes(recipe, mesh)
        places = jax.tree.map(lambda x: x.sharding, self.state)
        self._rate = schedule(recipe.optim, recipe.steps)
        optimizer = make_optimizer(recipe.optim, recipe.model.dimensions())
        self._init = jax.jit(
            functools.partial(init_state, model=self.model, optimizer=optimizer),
            out_shardings=places,
        )
        self.step: Any = jax.jit(
            functools.partial(
                train_step, model=self.model, optim=recipe.optim,
                loss=recipe.loss, caption=recipe.caption, mesh=mesh,
                accumulation=recipe.accumulation, seed=recipe.seed,
            ),
            in_shardings=(places, jax.tree.map(lambda x: x.sharding, self.batch)),
            out_shardings=(places, sharding.replicated(mesh)),
            donate_argnums=0,
            compiler_options=processes.compiler_options(mesh.devices.flat[0].platform),
        )  # fmt: skip

    def init(self, given: Params | None = None) -> State:
        """Draw the state where it lies, with the parameters that are `given` in their place."""
        return self._init(jax.random.key(self.recipe.seed), given=given)

    def place(self, batch: Inputs, step: int = 0) -> Inputs:
        """Put this process's part of a batch, NumPy arrays by name, on the mesh.

        With it goes the learning rate of `step`, the number of steps taken before: the schedule
        stays out of the compiled step, so that runs that differ in it alone share the program.
        """
        given = {**batch, "rate": np.float32(self._rate(step))}
        return jax.tree.map(
            lambda x, rows: jax.make_array_from_process_local_data(x.sharding, rows),
            self.batch, {name: given[name] for name in self.batch},
        )  # fmt: skip


def init_state(
    key: Array, model: CLIP, optimizer: optax.GradientTransformation, given: Params | None = None
) -> State:
    """Draw parameters, except those given, and start the optimizer at step 0."""
    params = model.init(key) | (given or {})
    trainable, _ = split_batch_stats(params)
    return State(jnp.zeros((), jnp.int32), params, optimizer.init(trainable))


def shapes(recipe: Recipe, mesh: AnyMesh) -> tuple[State, Inputs]:
    """Return state and batch as shapes that know where they lie on the mesh.

    Raises InputError unless the mesh can split the batch and every parameter.
    """
    sharding.check_batch_size(recipe.batch_size, mesh)
    model, optimizer = CLIP(recipe.model), make_optimizer(recipe.optim, recipe.model.dimensions())
    state = jax.eval_shape(functools.partial(init_state, jax.random.key(0), model, optimizer))
    params = sharding.param_shardings(recipe.model, state.params, mesh)
    opt_state = sharding.like_params(state.opt_state, params, mesh)
    places = State(sharding.replicated(mesh), params, opt_state)
    images = recipe.model.vision.image_spec.shapes(recipe.batch_size)
    length = recipe.model.text.context_length
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    return jax.tree.map(_placed, state, places), {
        "image": jax.tree.map(lambda x: _placed(x, rows), images),
        "text": jax.ShapeDtypeStruct((recipe.batch_size, length), jnp.int32, sharding=rows),
        "rate": jax.ShapeDtypeStruct((), jnp.float32, sharding=whole),
    }


def _placed(x: jax.ShapeDtypeStruct, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)


def encode(
    trainable: Params, batch_stats: Params, batch: Inputs, *, model: CLIP, mesh: Mesh,
    locked: tuple[Tower, ...] = (), key: Array | None = None,
    caption: CaptionConfig = CaptionConfig(),
) -> tuple[Features, Params]:  # fmt: skip
    """Embed both sides of a batch at unit length; return them and BatchNorm's new statistics.

    With a decoder, each row's caption loss is the third of the features. With `key` patches are
    dropped: a pair's `row` in the global batch decides which, so that
    neither the mesh nor the number of chunks matters.
    """
    layout = sharding.layout(mesh, model.config.attention)
    model = replace(model, layout=layout)
    frozen = {TOWERS[tower]: jax.lax.stop_gradient(trainable[TOWERS[tower]]) for tower in locked}
    params = join_batch_stats(trainable | frozen, batch_stats)
    images, texts = model.normalize(batch["image"]), batch["text"]
    keys = None
    if key is not None and "image" not in locked:
        keys = _row_keys(key, layout.constrain(batch["row"]))
    written: Features = ()
    if model.config.decoder is not None:
        image_features, image_tokens = model.encode_image_and_tokens(params, images, keys)
        text_features, states = model.encode_text_and_write(params, texts, image_tokens)
        axes = Axes(sharding.BATCH_AXES, sharding.DIMENSIONS["D"], sharding.DIMENSIONS["V"])
        written = (
            caption_loss(
                layout.constrain(states), params["decoder"]["vocab_projection"], texts[:, 1:],
                pad_id=model.config.text.tokenizer.pad_id, chunk_size=caption.chunk_size,
                mesh=mesh, axes=axes,
            ),
        )  # fmt: skip
    else:
        if "image" in locked:  # as when it is used: all patches, BatchNorm's running statistics
            image_features = model.encode_image(params, images)
        else:
            image_features, batch_stats = model.encode_image_train(params, images, keys)
        text_features = model.encode_text(params, texts)
    features = (l2_normalize(image_features), l2_normalize(text_features), *written)
    return tuple(layout.constrain(x) for x in features), batch_stats


def _row_keys(key: Array, rows: Int[Array, " B"]) -> Key[Array, " B"]:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows)


def compare(
    trainable: Params, image_features: Float[Array, "B E"], text_features: Float[Array, "B E"],
    *written: Float[Array, " B"],
    text: Int[Array, "B L"], loss: LossConfig, mesh: Mesh, pad_id: int = 0,
    caption: CaptionConfig = CaptionConfig(),
) -> tuple[Float[Array, ""], Metrics]:  # fmt: skip
    """Compute the loss of one global batch: the contrastive, and what was `written`, if any.

    In the contrastive loss every other pair is a negative; the caption loss is a token's mean.
    """
    value, metrics = contrastive_loss(
        loss,
        image_features,
        text_features,
        jnp.exp(trainable["logit_scale"]),
        trainable.get("logit_bias"),
        caption_ids=caption_ids(text),
        mesh=mesh,
        axes=sharding.BATCH_AXES,
    )
    if not written:
        return value, metrics
    mean = written[0].sum() / count_labels(text[:, 1:], pad_id)
    parts = {"contrastive_loss": value, "caption_loss": mean}
    value = caption.contrastive_weight * value + caption.weight * mean
    return value, metrics | jax.lax.stop_gradient(parts)


def compute_loss(
    trainable: Params, batch_stats: Params, batch: Inputs, *, model: CLIP, loss: LossConfig,
    mesh: Mesh, locked: tuple[Tower, ...] = (), key: Array | None = None,
    caption: CaptionConfig = CaptionConfig(),
) -> tuple[Float[Array, ""], tuple[Metrics, Params]]:  # fmt: skip
    """Compute the loss of one global batch, and with it metrics and BatchNorm's new statistics."""
    features, batch_stats = encode(
        trainable, batch_stats, batch, model=model, mesh=mesh, locked=locked, key=key,
        caption=caption,
    )  # fmt: skip
    value, metrics = compare(
        trainable, *features, text=batch["text"], loss=loss, mesh=mesh, caption=caption,
        pad_id=model.config.text.tokenizer.pad_id,
    )  # fmt: skip
    return value, (metrics, batch_stats)


def train_step(
    state: State, batch: Inputs, *, model: CLIP, optim: OptimConfig, loss: LossConfig, mesh: Mesh,
    accumulation: int = 1, seed: int = 0, caption: CaptionConfig = CaptionConfig(),
) -> tuple[State, Metrics]:  # fmt: skip
    """Take one step: towers, global similarity, loss, gradients, update.

    With `accumulation` the towers see the batch in that many chunks, one after the other, in the
    memory of one; the gradients are those of the whole. `seed` is that of the patch dropout.
    """
    trainable, batch_stats = split_batch_stats(state.params)
    vision, rate = model.config.vision, batch["rate"]
    batch, key = {name: batch[name] for name in ("image", "text")}, None
    if isinstance(vision, ViTConfig) and vision.patch_dropout:
        # Threefry, whatever the default: the rows' keys must give the same under vmap.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), state.step)
        batch = batch | {"row": jnp.arange(len(batch["text"]))}
    options: dict[str, Any] = {
        "model": model, "mesh": mesh, "locked": optim.locked, "key": key, "caption": caption
    }  # fmt: skip
    pad_id = model.config.text.tokenizer.pad_id
    writing: dict[str, Any] = {"mesh": mesh, "caption": caption, "pad_id": pad_id}
    if accumulation == 1:
        objective = jax.value_and_grad(
            functools.partial(compute_loss, loss=loss, **options), has_aux=True
        )
        (value, (metrics, batch_stats)), grads = objective(trainable, batch_stats, batch)
    else:
        group = vision.batch_norm_group if isinstance(vision, ResNetConfig) else None
        (value, (metrics, batch_stats)), grads = cached_value_and_grad(
            lambda params, chunk: encode(params, batch_stats, chunk, **options),
            functools.partial(compare, text=batch["text"], loss=loss, **writing),
            trainable,
            batch,
            accumulation,
            group_size=group or 1,
        )
    optimizer = make_optimizer(optim, model.config.dimensions())
    updates, opt_state = optimizer.update(grads, state.opt_state, trainable, rate=rate)
    trainable = cast(Params, optax.apply_updates(trainable, updates))
    cap = math.log(optim.max_logit_scale)  # the paper clips the scale to keep training stable
    trainable["logit_scale"] = jnp.minimum(trainable["logit_scale"], cap)
    if isinstance(opt_state, GuardState):
        done = opt_state.skipped == state.opt_state.skipped
        _, before = split_batch_stats(state.params)
        batch_stats = jax.tree.map(lambda a, b: jnp.where(done, a, b), batch_stats, before)
        metrics |= {
            "skipped_updates": opt_state.skipped, "skipped_in_a_row": opt_state.skipped_in_a_row
        }  # fmt: skip
    metrics |= {
        "loss": value,
        "grad_norm": optax.tree.norm(grads),
        "param_norm": optax.tree.norm(trainable),
        "logit_scale": jnp.exp(trainable["logit_scale"]),
        "learning_rate": rate,
    }
    return State(state.step + 1, join_batch_stats(trainable, batch_stats), opt_state), metrics
