"""Optimizers and learning-rate schedules: AdamW as in the CLIP paper (section 2.5, tables 18 and
19), LAMB, Adafactor, Muon."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import optax

from clip_jax.errors import InputError, check_ranges, renamed_fields
from clip_jax.optim import wrappers
from clip_jax.optim.adafactor import Adafactor
from clip_jax.optim.lamb import LAMB
from clip_jax.optim.matrices import Rows
from clip_jax.optim.muon import Muon
from clip_jax.optim.optimizer import Optimizer, adam, decay
from clip_jax.optim.wrappers import Tower


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """Half a cosine from the peak to the final learning rate at the last step (CLIP paper)."""


@dataclass(frozen=True, kw_only=True)
class Constant:
    """Constant peak learning rate, for parent runs of cool-down branches (arXiv:2506.04598)."""


@dataclass(frozen=True, kw_only=True)
class CoolDown:
    """Constant peak, then a cool-down to the final learning rate over the last steps (WSD)."""

    steps: int  # Length of the cool-down in steps, counted back from the end of the run.
    # Shape of the cool-down. linear; sqrt: 1 − √progress, steep at first (Hägele et al. 2024,
    # arXiv:2405.18392); power: (1 − progress)^power, as in open_clip.
    shape: Literal["linear", "sqrt", "power"] = "linear"
    power: float = 1.0  # Exponent of the shape power; other shapes ignore it.

    def __post_init__(self) -> None:
        check_ranges(self, "optim.schedule.", steps="[1, inf)", power="(0, inf)")


@dataclass(frozen=True, kw_only=True)
class InverseSqrt:
    """Inverse square root, without an end: peak × √(timescale / (timescale + steps - warm-up))."""

    timescale: int = 10_000  # Steps after which the learning rate has fallen to 71% of its peak.

    def __post_init__(self) -> None:
        check_ranges(self, "optim.schedule.", timescale="[1, inf)")


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """AdamW (Loshchilov & Hutter, arXiv:1711.05101), the optimizer of the CLIP paper."""

    def chain(self, config: Any, rows: Rows) -> list[Any]:
        """Return Adam's moments and weight decay."""
        return [adam(config), decay(config)]


@renamed_fields(
    "0.3.0", image_rate="image_learning_rate_scale", text_rate="text_learning_rate_scale"
)
@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Settings of the optimizer and the learning-rate schedule; defaults: the paper's for ViT-B."""

    optimizer: AdamW | LAMB | Adafactor | Muon = AdamW()

    learning_rate: float = 5e-4  # Peak learning rate, reached after the warm-up.
    final_learning_rate: float = 0.0  # Learning rate at the last step of schedules that decay.
    warmup_steps: int = 2_000  # Number of steps of linear warm-up from a learning rate of zero.
    schedule: Cosine | Constant | CoolDown | InverseSqrt = Cosine()  # after the warm-up
    weight_decay: float = 0.2  # Weight decay, × learning rate; not on gains, biases and scalars.
    b1: float = 0.9  # Decay rate of the first moment.
    b2: float = 0.98  # Decay rate of the second moment (paper: 0.98 for ViT, 0.999 for ResNet).
    eps: float = 1e-6  # Constant added to Adam's denominator (paper: ViT 1e-6, ResNet 1e-8).
    clip_norm: float | None = None  # Maximum global norm of the gradient; None: no clipping.
    max_logit_scale: float = 100.0  # Upper bound on exp(logit_scale), the inverse temperature.
    # Data type in which the first moment is stored.
    first_moment: Literal["float32", "bfloat16"] = "float32"
    image_learning_rate_scale: float = 1.0  # Factor on the image tower's learning rate.
    text_learning_rate_scale: float = 1.0  # Factor on the text tower's learning rate.
    # Each layer's learning rate as a multiple of the next layer's. For fine-tuning, 0.65 to 0.9
    # changes the first layers least (BEiT, arXiv:2106.08254).
    layer_decay: float = 1.0
    # Towers with frozen weights (locked-image tuning, LiT: image); model.image_head is no part of
    # the image tower and is trained.
    locked: tuple[Tower, ...] = ()
    # Decay rate of a moving average of the weights, used in evaluation; None: no average.
    ema_decay: float | None = None
    # Skip updates whose gradient norm is not finite or exceeds this multiple of its running mean;
    # None: stop the run at the first that is not finite.
    skip_norm_ratio: float | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "optim.",
            learning_rate="[0, inf)",
            final_learning_rate="[0, inf)",
            warmup_steps="[0, inf)",
            weight_decay="[0, inf)",
            b1="[0, 1)",
            b2="[0, 1)",
            eps="(0, inf)",
            clip_norm="(0, inf)",
            max_logit_scale="(0, inf)",
            image_learning_rate_scale="[0, inf)",
            text_learning_rate_scale="[0, inf)",
            layer_decay="(0, 1]",
            ema_decay="[0, 1)",
            skip_norm_ratio="(1, inf)",
        )


def schedule(config: OptimConfig, steps: int) -> Callable[[float], float]:
    """Return the learning rate as a function of the step, from 0: warm-up, then the schedule.

    The warm-up is linear and begins with peak / warm-up, and a run that is shorter than its warm-up
    ends within it, as in open_clip. Raises InputError if warm-up and cool-down are longer than the
    run.
    """
    warmup, peak, final = config.warmup_steps, config.learning_rate, config.final_learning_rate
    kind = config.schedule
    if isinstance(kind, CoolDown) and warmup + kind.steps > steps:
        raise InputError(
            f"optim.schedule.steps={kind.steps} of cool-down after optim.warmup_steps={warmup} are "
            f"more than steps={steps}; lower one of them, or raise --steps."
        )

    def rate(step: float) -> float:
        if step < warmup:
            return peak * (step + 1) / warmup
        match kind:
            case Cosine():
                progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
                left = 0.5 * (1 + math.cos(math.pi * progress))
            case Constant():
                return peak
            case CoolDown():
                progress = max(step - (steps - kind.steps), 0) / kind.steps
                power = kind.power if kind.shape == "power" else 1.0
                left = 1 - math.sqrt(progress) if kind.shape == "sqrt" else (1 - progress) ** power
            case InverseSqrt():
                return peak * math.sqrt(kind.timescale / (kind.timescale + step - warmup))
        return final + (peak - final) * left

    return rate


def make_optimizer(
    config: OptimConfig, rows: Rows, layers_from: wrappers.LayersFrom = lambda path: 0
) -> optax.GradientTransformationExtraArgs:
    """Build the gradient transformation: optional clipping, the optimizer, decay, learning rates.

    Optional wrappers lock towers, average the weights and skip updates. `update` takes the step's
    `learning_rate`, so that the compiled step is independent of the schedule. `rows` name the
    dimensions of every parameter (`CLIPConfig.dimensions`), and `layers_from` counts the layers
    from a parameter's to its tower's last.
    """
    parts = config.optimizer.chain(config, rows)
    optimizer = optax.chain(*parts, wrappers.descend())
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    scales = config.image_learning_rate_scale, config.text_learning_rate_scale
    if scales != (1.0, 1.0):
        optimizer = optax.chain(optimizer, wrappers.scale_towers(*scales))
    if config.layer_decay < 1:
        by_layer = wrappers.scale_layers(config.layer_decay, rows, layers_from)
        optimizer = optax.chain(optimizer, by_layer)
    if config.locked:
        optimizer = wrappers.lock(optimizer, config.locked)
    if config.ema_decay is not None:
        optimizer = wrappers.average(optimizer, config.ema_decay, config.max_logit_scale)
    if config.skip_norm_ratio is not None:
        optimizer = wrappers.guard(optimizer, config.skip_norm_ratio)
    return optimizer
