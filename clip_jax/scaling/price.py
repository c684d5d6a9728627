"""What a ladder costs: FLOPs become hours, and hours dollars, by a stated MFU and rate."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clip_jax import chips
from clip_jax.errors import InputError, check_ranges


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """What trains a point, as assumed for its hours and its price."""

    chip: str = "TPU v5e"  # as in chip_specs.csv, or anything with a peak_flops
    chips: int = 1  # that train one point together
    mfu: float = 0.4  # assumed share of the peak; `clip-jax plan` and `bench` have better figures
    price: float | None = None  # US dollars of one chip for one hour
    peak_flops: float | None = None  # FLOP/s of one chip; None: the table's dense bf16 peak
    start_seconds: float = 0.0  # of each point: start, compilation, evaluation

    def __post_init__(self) -> None:
        if self.peak_flops is None and self.chip not in chips.chips():
            raise InputError(
                f"hardware.chip={self.chip!r} is none of {', '.join(chips.chips())}; take one of "
                "these or give hardware.peak_flops."
            )
        check_ranges(
            self, "hardware.",
            chips="[1, inf)", mfu="(0, 1]", price="[0, inf)", peak_flops="(0, inf)",
            start_seconds="[0, inf)",
        )  # fmt: skip

    def hours(self, training_flops: float) -> float:
        """Estimate the hours of one point: the one place where FLOPs become time."""
        peak = self.peak_flops or chips.chips()[self.chip].peak_flops
        seconds = training_flops / (self.chips * peak * self.mfu) + self.start_seconds
        return seconds / 3600

    def dollars(self, hours: float) -> float | None:
        return None if self.price is None else hours * self.chips * self.price

    def estimate(self, training_flops: Sequence[float]) -> dict[str, Any]:
        """Estimate runs one after the other, as JSON values, with what was assumed."""
        hours = sum(map(self.hours, training_flops))
        assumed = {"chip": self.chip, "chips": self.chips, "mfu": self.mfu, "price": self.price}
        return {**assumed, "hours": hours, "dollars": self.dollars(hours)}


def in_words(estimate: Mapping[str, Any]) -> str:
    """Put an estimate in a line for a terminal."""
    line = (
        f"  {estimate['chips']} {estimate['chip']} at an assumed {estimate['mfu']:.0%} of the "
        f"peak: {duration(estimate['hours'])} one after the other"
    )
    if estimate["price"]:
        line += f", ${estimate['dollars']:,.0f} at ${estimate['price']:g} a chip and hour"
    return line


def duration(hours: float) -> str:
    """Write a time in the unit that suits it."""
    if hours >= 48:
        return f"{hours / 24:,.0f} d"
    if hours >= 1:
        return f"{hours:.1f} h"
    return f"{hours * 60:.1f} min"
