"""Wrappers of an optimizer: learning rates by tower and layer, locks, averages, skipped updates."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from clip_jax.models.clip import Params, path_name
from clip_jax.optim.matrices import Rows

Tower = Literal["image", "text"]
TOWERS: dict[Tower, str] = {"image": "visual", "text": "text"}  # their names in the parameter tree
USUAL_DECAY = 0.99  # decay rate of the running mean of gradient norms
USUAL_UPDATES = 100  # number of updates before a gradient norm can count as unusual
# The number of layers from a parameter's to its tower's last (`CLIPConfig.layers_from`).
LayersFrom = Callable[[str], int]


def descend() -> optax.GradientTransformationExtraArgs:
    """Multiply updates by minus the learning rate, an argument of `update`."""

    def init(params: Any) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        updates = jax.tree.map(lambda x: -extra["learning_rate"] * x, updates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def scale_towers(image: float, text: float) -> optax.GradientTransformation:
    """Multiply the updates of each tower by a factor; others (the logit scale) are unchanged."""

    def update(updates: Any, _: Any) -> Any:
        return updates | {
            TOWERS[tower]: jax.tree.map(lambda x, rate=rate: rate * x, updates[TOWERS[tower]])
            for tower, rate in (("image", image), ("text", text))
            if TOWERS[tower] in updates  # or it has no adapters
        }

    return optax.stateless(update)


def scale_layers(decay: float, rows: Rows, layers_from: LayersFrom) -> optax.GradientTransformation:
    """Multiply updates by decay^n: n is 0 after a tower's last layer, 1 in the last, and so on.

    Parameters before the first layer (embeddings, patches, a ResNet's stem) count as one more
    layer. Parameters of no tower are unchanged.
    """

    def scaled(path: tuple[Any, ...], x: Array) -> Array:
        name = path_name(path)
        layers: Any = layers_from(name)
        if layers and rows[name].startswith("depth"):
            layers = layers - jnp.arange(len(x)).reshape(-1, *[1] * (x.ndim - 1))
        return decay**layers * x

    def update(updates: Any, _: Any) -> Any:
        return jax.tree_util.tree_map_with_path(scaled, updates)

    return optax.stateless(update)


def lock(
    inner: optax.GradientTransformationExtraArgs, towers: tuple[Tower, ...]
) -> optax.GradientTransformationExtraArgs:
    """Freeze towers: no updates, and no moments in memory."""
    names = [TOWERS[tower] for tower in towers]

    def locked(tree: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key in names, tree)

    def others(tree: Params) -> Any:
        return jax.tree.map(lambda x: not x, locked(tree))

    return optax.chain(optax.masked(inner, others), optax.masked(optax.set_to_zero(), locked))


def capped(params: Params, max_logit_scale: float) -> Params:
    """Return the parameters with a clipped logit scale, by which the paper keeps training stable.

    Adapters train no logit scale.
    """
    if "logit_scale" not in params:
        return params
    limit = math.log(max_logit_scale)
    return params | {"logit_scale": jnp.minimum(params["logit_scale"], limit)}


class AverageState(NamedTuple):
    """The optimizer's state and the moving average of the parameters."""

    inner: Any
    ema: Params


def average(
    inner: optax.GradientTransformationExtraArgs, decay: float, max_logit_scale: float
) -> optax.GradientTransformationExtraArgs:
    """Keep an exponential moving average of the weights with `capped` logit scale, in float32."""

    def init(params: Any) -> AverageState:
        ema = jax.tree.map(jnp.copy, capped(params, max_logit_scale))
        return AverageState(inner.init(params), ema)

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, AverageState]:
        updates, after = inner.update(updates, state.inner, params, **extra)
        new = capped(cast(Params, optax.apply_updates(params, updates)), max_logit_scale)
        ema = jax.tree.map(lambda old, x: decay * old + (1 - decay) * x, state.ema, new)
        return updates, AverageState(after, capped(ema, max_logit_scale))

    return optax.GradientTransformationExtraArgs(init, update)


class GuardState(NamedTuple):
    """The optimizer's state, the usual gradient norm, and counts of skipped updates."""

    inner: Any
    usual_norm: Float[Array, ""]  # running mean of the norms of applied updates, not bias-corrected
    updates: Int[Array, ""]  # number of applied updates
    skipped: Int[Array, ""]  # number of skipped updates
    skipped_in_a_row: Int[Array, ""]


def guard(
    inner: optax.GradientTransformationExtraArgs, ratio: float
) -> optax.GradientTransformationExtraArgs:
    """Skip updates whose gradient norm is not finite or more than `ratio` times its running mean.

    A skipped update leaves parameters and state unchanged. The compiled step decides by the global
    gradient, so that all devices and hosts decide alike.
    """

    def init(params: Any) -> GuardState:
        # Four separate arrays: the step donates them, and none may be donated twice.
        return GuardState(
            inner.init(params), jnp.zeros(()), *(jnp.zeros((), jnp.int32) for _ in range(3))
        )

    def update(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, GuardState]:
        norm = optax.tree.norm(updates)
        usual = state.usual_norm / (1 - USUAL_DECAY ** jnp.maximum(state.updates, 1))
        usual = jnp.where(state.updates < USUAL_UPDATES, jnp.inf, usual)
        good = jnp.isfinite(norm) & (norm <= ratio * usual)
        updates, after = inner.update(updates, state.inner, params, **extra)
        mean, none = USUAL_DECAY * state.usual_norm + (1 - USUAL_DECAY) * norm, jnp.int32(0)
        done = GuardState(after, mean, state.updates + 1, state.skipped, none)
        not_done = state._replace(
            skipped=state.skipped + 1, skipped_in_a_row=state.skipped_in_a_row + 1
        )
        state = jax.tree.map(lambda new, old: jnp.where(good, new, old), done, not_done)
        return jax.tree.map(lambda x: jnp.where(good, x, 0), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def with_new_norms(opt_state: Any) -> Any:
    """Return an optimizer state whose guard has seen no gradient norm: another loss has others."""
    if not isinstance(opt_state, GuardState):
        return opt_state
    none = jax.tree.map(jnp.zeros_like, (opt_state.usual_norm, opt_state.updates))
    return opt_state._replace(usual_norm=none[0], updates=none[1])


def unless_skipped(opt_states: tuple[Any, Any], new: Any, old: Any) -> Any:
    """Return `new`, or `old` if the update between the two optimizer states was skipped."""
    before, after = opt_states
    if not isinstance(after, GuardState):
        return new
    done = after.skipped == before.skipped
    return jax.tree.map(lambda a, b: jnp.where(done, a, b), new, old)


def skipped_updates(opt_state: Any) -> dict[str, Int[Array, ""]]:
    """Return the metrics of an optimizer that skips updates; none of others."""
    if not isinstance(opt_state, GuardState):
        return {}
    return {
        "skipped_updates": opt_state.skipped,
        "skipped_in_a_row": opt_state.skipped_in_a_row,
    }


def averaged(opt_state: Any, params: Params) -> Params:
    """Return the parameters to evaluate: their average if the optimizer keeps one."""
    inner = opt_state.inner if isinstance(opt_state, GuardState) else opt_state
    return params | inner.ema if isinstance(inner, AverageState) else params
