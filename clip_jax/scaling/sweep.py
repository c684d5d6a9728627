"""A sweep: every point of a ladder at several learning rates, batches, warm-ups, weight decays."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from clip_jax.config import Config
from clip_jax.errors import InputError, check_ranges


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What the trials of a point differ in: every combination of these, one trial each."""

    rates: tuple[float, ...] = (1.0,)  # learning rates, as multiples of what the rules give
    batch_sizes: tuple[int, ...] = ()  # none: the point's own. Samples stay, steps follow
    warmups: tuple[float, ...] = (1.0,)  # steps of warm-up, as multiples of what the rules give
    weight_decays: tuple[float, ...] = ()  # none: the base's own

    def __post_init__(self) -> None:
        check_ranges(
            self, "sweep.",
            rates="(0, inf)", batch_sizes="[2, inf)", warmups="[0, inf)", weight_decays="[0, inf)",
        )  # fmt: skip
        for name in ("rates", "batch_sizes", "warmups", "weight_decays"):
            values = getattr(self, name)
            if len(set(values)) < len(values) or (name in ("rates", "warmups") and not values):
                raise InputError(
                    f"sweep.{name}={values} must name each value once, and one at least."
                )

    def trials(self, config: Config) -> Iterator[tuple[str, Config]]:
        """Make a config for every combination at one batch size, named by what is swept."""
        decays = self.weight_decays or (config.optim.weight_decay,)
        for rate, warmup, decay in itertools.product(self.rates, self.warmups, decays):
            warmup_steps = round(warmup * config.optim.warmup_steps)
            if warmup_steps >= config.steps:
                raise InputError(
                    f"sweep.warmups={warmup:g} makes {warmup_steps} steps of warm-up, of "
                    f"{config.steps}: take a smaller multiple, or rules.max_warmup_share."
                )
            optim = replace(
                config.optim,
                learning_rate=_digits(rate * config.optim.learning_rate),
                final_learning_rate=_digits(rate * config.optim.final_learning_rate),
                warmup_steps=warmup_steps,
                weight_decay=decay,
            )
            parts = [
                (self.rates, f"rate{rate:g}"), (self.batch_sizes, f"batch{config.batch_size}"),
                (self.warmups, f"warmup{warmup:g}"), (self.weight_decays, f"decay{decay:g}"),
            ]  # fmt: skip
            name = "".join(f"-{text}" for values, text in parts if len(values) > 1)
            yield name, replace(config, optim=optim)


def _digits(number: float) -> float:
    return float(f"{number:.3g}")
