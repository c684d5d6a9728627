"""What every optimizer defines, and what most of them share: Adam's moments and weight decay."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from clip_jax.models.clip import Params
from clip_jax.optim.matrices import Rows
from clip_jax.parts import Part

NO_DECAY = frozenset(
    # Gains, biases and scalars. OpenAI's code decays only tensors of two or more axes, so the
    # class token, a vector, is left out with them.
    {"scale", "bias", "gamma", "logit_scale", "logit_bias", "class_embedding"}
    | {"text_projection_bias", "proj_bias", "mask_token"}
)


class Optimizer(Part):
    """Base of the optimizers that `optim.optimizer` may be."""

    def chain(self, config: Any, rows: Rows) -> list[Any]:
        """Return the gradient transformations of Optax, in order, that make updates of gradients.

        The learning rate follows them, negated; clipping precedes them. `config` is the
        `OptimConfig`; `rows` name the dimensions of every parameter. State whose path ends in a
        parameter's path is sharded like it.
        """
        raise NotImplementedError


def adam(config: Any, **options: Any) -> optax.GradientTransformation:
    """Return Adam's moments, with `optim.b1`, `optim.b2`, `optim.eps` and `optim.first_moment`."""
    first_moment = jnp.dtype(config.first_moment)
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=first_moment, **options)


def decay(config: Any) -> optax.GradientTransformation:
    """Return decoupled weight decay, without gains, biases and scalars."""
    return optax.add_decayed_weights(config.weight_decay, decay_mask)


def decay_mask(params: Params) -> Any:
    """Return True for the parameters that weight decay applies to, judged by their names."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NO_DECAY, params)
