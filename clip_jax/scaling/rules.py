"""How a point's rate, warm-up and schedule follow from its batch, its width and its length."""

from dataclasses import dataclass, replace
from typing import Literal

from clip_jax.config import Config
from clip_jax.errors import check_ranges
from clip_jax.optim import CoolDown, OptimConfig


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """How a point's learning rate and warm-up follow from its batch, its width and its length.

    The base config's peak rate holds at the base's batch size and at `reference_width`:
    rate = base × (batch / base's batch)^batch_exponent × (width / reference)^width_exponent.
    The final rate keeps its share of the peak.
    """

    batch_exponent: float = 0.5  # Adam: the square root (Malladi et al. 2022, arXiv:2205.10287)
    reference_width: int = 768  # of the image tower
    width_exponent: float = 0.0  # 0: one rate for all widths, as open_clip's from S/32 to L/14
    max_warmup_share: float = 0.1  # of a run's steps, where the base's warm-up is longer than that

    def __post_init__(self) -> None:
        check_ranges(
            self, "rules.",
            batch_exponent="(-inf, inf)", reference_width="[1, inf)",
            width_exponent="(-inf, inf)", max_warmup_share="[0, 1)",
        )  # fmt: skip

    def apply(self, base: Config, batch_size: int, width: int, steps: int) -> OptimConfig:
        """Return the optimizer's config of one point."""
        factor = (batch_size / base.batch_size) ** self.batch_exponent
        factor *= (width / self.reference_width) ** self.width_exponent
        return replace(
            base.optim,
            learning_rate=_digits(base.optim.learning_rate * factor),
            final_learning_rate=_digits(base.optim.final_learning_rate * factor),
            warmup_steps=min(base.optim.warmup_steps, int(self.max_warmup_share * steps)),
        )


@dataclass(frozen=True, kw_only=True)
class BranchesConfig:
    """Points as cool-downs that branch from one trunk for each model and seed.

    The trunk keeps its rate at the peak and evaluates nothing; a point goes on from it to the
    base's final rate. It is, bit for bit, what a run of its own with that schedule would be.
    """

    share: float = 0.2  # of a point's steps that cool down
    shape: Literal["linear", "sqrt", "power"] = "linear"  # see CoolDown
    power: float = 1.0  # of the shape of that name

    def __post_init__(self) -> None:
        check_ranges(self, "branches.", share="(0, 1)", power="(0, inf)")

    def cool_down(self, steps: int) -> CoolDown:
        """Return the schedule of a point with so many steps from the trunk's beginning."""
        return CoolDown(steps=max(round(self.share * steps), 1), shape=self.shape, power=self.power)


def _digits(number: float) -> float:
    """Round to three digits: a rate that a person can repeat."""
    return float(f"{number:.3g}")
