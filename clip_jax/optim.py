"""AdamW with warm-up and cosine decay, as the CLIP paper trains (section 2.5, tables 18 and 19)."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from clip_jax.models.clip import Params

NO_DECAY = frozenset(
    # Gains, biases and scalars. OpenAI's code decays only tensors of two or more axes, so the
    # class token, a vector, is left out with them.
    {"scale", "bias", "gamma", "logit_scale", "logit_bias", "class_embedding"}
    | {"text_projection_bias"}
)

Tower = Literal["image", "text"]
TOWERS = {"image": "visual", "text": "text"}  # where in the parameters
USUAL_DECAY = 0.99  # of the running mean of gradient norms that says what is usual
USUAL_UPDATES = 100  # before which nothing is unusual


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW. The defaults are the paper's for ViT-B."""

    learning_rate: float = 5e-4  # peak, after the warm-up
    final_learning_rate: float = 0.0  # at the last step
    warmup_steps: int = 2_000  # linear from zero
    weight_decay: float = 0.2  # on weights that are not gains or biases; decoupled, × learning rate
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.98  # decay of the second moment (paper: 0.98 for ViT, 0.999 for ResNet)
    eps: float = 1e-6  # paper: 1e-6 for ViT, 1e-8 for ResNet
    clip_norm: float | None = None  # global gradient norm; None: no clipping
    max_logit_scale: float = 100.0  # cap on exp(logit_scale)
    first_moment: Literal["float32", "bfloat16"] = "float32"  # storage of the first moment
    image_rate: float = 1.0  # the image tower's learning rate, as a multiple of learning_rate
    text_rate: float = 1.0  # the text tower's
    locked: tuple[Tower, ...] = ()  # towers that keep their weights (LiT: image)
    ema_decay: float | None = None  # of an average of the weights, which is evaluated; None: none
    # Skip an update whose gradient norm isn't finite, or is this many times the usual; None: stop
    # at the first that isn't finite.
    skip_norm_ratio: float | None = None

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"optim.ema_decay={self.ema_decay} must be from 0 to below 1.")
        if self.skip_norm_ratio is not None and self.skip_norm_ratio <= 1:
            raise ValueError(f"optim.skip_norm_ratio={self.skip_norm_ratio} must be more than 1.")
        if set(self.locked) == set(TOWERS):
            raise ValueError("optim.locked holds both towers: nothing but a scale would train.")


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine to the final rate at `steps`.

    The first step already moves (rate = peak / warm-up), as in open_clip. Raises ValueError when
    the warm-up is longer than the run.
    """
    warmup, peak, final = config.warmup_steps, config.learning_rate, config.final_learning_rate
    if warmup >= steps:
        raise ValueError(
            f"optim.warmup_steps={warmup} leaves nothing of steps={steps}; "
            "shorten the warm-up or train longer."
        )

    def rate(step: Any) -> Any:
        rising = peak * (step + 1) / max(warmup, 1)
        progress = (step - warmup) / (steps - warmup)
        falling = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rising, falling)

    return rate


def decay_mask(params: Params) -> Any:
    """True where weight decay applies, judged by the parameter's own name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NO_DECAY, params)


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Build the gradient transformation: optional clipping, Adam, decay, learning rates.

    Around them, where asked for: locked towers, averaged weights, skipped updates.
    """
    optimizer = optax.adamw(
        schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        mu_dtype=jnp.dtype(config.first_moment),
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    if (config.image_rate, config.text_rate) != (1.0, 1.0):
        optimizer = optax.chain(optimizer, scale_towers(config.image_rate, config.text_rate))
    if config.locked:
        optimizer = lock(optimizer, config.locked)
    if config.ema_decay is not None:
        optimizer = average(optimizer, config.ema_decay)
    if config.skip_norm_ratio is not None:
        optimizer = guard(optimizer, config.skip_norm_ratio)
    return optimizer


def scale_towers(image: float, text: float) -> optax.GradientTransformation:
    """Multiply the updates of either tower; what belongs to neither (the scale) stays."""

    def update(updates: Any, _: Any) -> Any:
        return updates | {
            TOWERS[tower]: jax.tree.map(lambda x, rate=rate: rate * x, updates[TOWERS[tower]])
            for tower, rate in (("image", image), ("text", text))
        }

    return optax.stateless(update)


def lock(
    inner: optax.GradientTransformation, towers: tuple[Tower, ...]
) -> optax.GradientTransformation:
    """Give no update to some towers, nor moments in memory."""

    names = [TOWERS[tower] for tower in towers]

    def locked(tree: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key in names, tree)

    def others(tree: Params) -> Any:
        return jax.tree.map(lambda x: not x, locked(tree))

    return optax.chain(optax.masked(inner, others), optax.masked(optax.set_to_zero(), locked))


class AverageState(NamedTuple):
    """Beside the optimizer's state, a slow copy of the parameters."""

    inner: Any
    ema: Params


def average(inner: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    """Keep an exponential moving average of the weights, in float32."""

    def init(params: Any) -> AverageState:
        return AverageState(inner.init(params), jax.tree.map(jnp.copy, params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, AverageState]:
        updates, after = inner.update(updates, state.inner, params)
        new = optax.apply_updates(params, updates)
        ema = jax.tree.map(lambda old, x: decay * old + (1 - decay) * x, state.ema, new)
        return updates, AverageState(after, ema)

    return optax.GradientTransformation(init, update)


class GuardState(NamedTuple):
    """Beside the optimizer's state, what is usual and what was skipped."""

    inner: Any
    usual_norm: Float[Array, ""]  # running mean of the norms of updates done, not yet corrected
    updates: Int[Array, ""]  # done
    skipped: Int[Array, ""]  # in all
    skipped_in_a_row: Int[Array, ""]


def guard(inner: optax.GradientTransformation, ratio: float) -> optax.GradientTransformation:
    """Leave parameters and state as they are where the gradient's norm is not finite or unusual.

    Unusual is more than `ratio` times the running mean. Decided from the global gradient in the
    compiled step, so that all devices and hosts decide alike.
    """

    def init(params: Any) -> GuardState:
        # Four arrays: the step gives its memory back, and may give none back twice.
        return GuardState(
            inner.init(params), jnp.zeros(()), *(jnp.zeros((), jnp.int32) for _ in range(3))
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, GuardState]:
        norm = optax.tree.norm(updates)
        usual = state.usual_norm / (1 - USUAL_DECAY ** jnp.maximum(state.updates, 1))
        usual = jnp.where(state.updates < USUAL_UPDATES, jnp.inf, usual)
        good = jnp.isfinite(norm) & (norm <= ratio * usual)
        updates, after = inner.update(updates, state.inner, params)
        done = GuardState(
            after,
            USUAL_DECAY * state.usual_norm + (1 - USUAL_DECAY) * norm,
            state.updates + 1,
            state.skipped,
            jnp.zeros((), jnp.int32),
        )
        not_done = state._replace(
            skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1
        )
        state = jax.tree.map(lambda new, old: jnp.where(good, new, old), done, not_done)
        return jax.tree.map(lambda x: jnp.where(good, x, 0), updates), state

    return optax.GradientTransformation(init, update)


def averaged(opt_state: Any, params: Params) -> Params:
    """Return the parameters to evaluate: the average where the optimizer keeps one."""
    inner = opt_state.inner if isinstance(opt_state, GuardState) else opt_state
    return params | inner.ema if isinstance(inner, AverageState) else params
