"""AdamW with warm-up and cosine decay, as the CLIP paper trains (section 2.5, tables 18 and 19)."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from clip_jax.models.clip import Params

NO_DECAY = frozenset(
    # Gains, biases and scalars. OpenAI's code decays only tensors of two or more axes, so the
    # class token, a vector, is left out with them.
    {"scale", "bias", "gamma", "logit_scale", "logit_bias", "class_embedding"}
    | {"text_projection_bias"}
)


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
    """Build the gradient transformation: optional clipping, Adam, decay, learning rate."""
    adamw = optax.adamw(
        schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        mu_dtype=jnp.dtype(config.first_moment),
        weight_decay=config.weight_decay,
        mask=decay_mask,
    )
    if config.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
