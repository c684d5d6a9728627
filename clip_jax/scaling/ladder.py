"""Describe a ladder of runs: models × teachers × samples seen × seeds (× trials of a sweep).

Each point has its own schedule, or is a cool-down branch from a parent run at a constant learning
rate (arXiv:2506.04598). A spec is a Python file with `get_ladder() -> LadderConfig`. FLOPs are
counted; hours follow from an assumed MFU.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from clip_jax import chips
from clip_jax.config import Config
from clip_jax.config_files import run_file
from clip_jax.errors import InputError, check_ranges
from clip_jax.losses import TermConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.optim import CoolDown, OptimConfig


@dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """Hardware that trains a point, to estimate its hours."""

    chip: str = "TPU v5e"  # Name in chips.csv, or any name with peak_flops.
    chips: int = 1  # Number of chips that train one point together.
    mfu: float = 0.4  # Assumed MFU (0 to 1); `clip-jax plan` and `bench` have better figures.
    peak_flops: float | None = None  # FLOP/s of one chip. None: its dense bf16 peak in the table.
    start_seconds: float = 0.0  # Seconds per point for start, compilation and evaluation.

    def __post_init__(self) -> None:
        if self.peak_flops is None and self.chip not in chips.table():
            raise InputError(
                f"hardware.chip={self.chip!r} is not one of {', '.join(chips.table())}; use one of "
                "these, or set hardware.peak_flops."
            )
        check_ranges(
            self,
            "hardware.",
            chips="[1, inf)",
            mfu="(0, 1]",
            peak_flops="(0, inf)",
            start_seconds="[0, inf)",
        )

    def hours(self, training_flops: float) -> float:
        """Estimate the hours of one point; nothing else converts FLOPs to time."""
        peak = self.peak_flops or chips.table()[self.chip].peak_flops
        seconds = training_flops / (self.chips * peak * self.mfu) + self.start_seconds
        return seconds / 3600

    def estimate(self, training_flops: Iterable[float]) -> dict[str, Any]:
        """Estimate the hours of sequential runs; returns JSON values with the assumptions."""
        hours = sum(self.hours(work) for work in training_flops)
        return {"chip": self.chip, "chips": self.chips, "mfu": self.mfu, "hours": hours}


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """Rules for a point's learning rate and its schedule, by its batch size, width and steps.

    The base config's learning rates are for its batch size and `reference_width`. A point's are
    base × (batch / base's batch)^batch_exponent × (width / reference_width)^width_exponent.
    """

    # Exponent of the batch size; 0.5 suits Adam (Malladi et al. 2022, arXiv:2205.10287).
    batch_exponent: float = 0.5
    reference_width: int = 768  # Image tower width that the base learning rate is for.
    width_exponent: float = 0.0  # Exponent of the width. 0: the same learning rate for all widths.
    max_warmup_share: float = 0.1  # Maximum warm-up, as a share of a run's steps.
    # Cool-down, as a share of a run's steps; the base's schedule must have one (CoolDown). None: as
    # many steps as the base's.
    cool_down_share: float | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "rules.",
            batch_exponent="(-inf, inf)",
            reference_width="[1, inf)",
            width_exponent="(-inf, inf)",
            max_warmup_share="[0, 1)",
            cool_down_share="(0, 1]",
        )

    def apply(self, base: Config, batch_size: int, width: int, steps: int) -> OptimConfig:
        """Return the optimizer config of one point."""
        factor = (batch_size / base.batch_size) ** self.batch_exponent
        factor *= (width / self.reference_width) ** self.width_exponent
        warmup_steps = min(base.optim.warmup_steps, int(self.max_warmup_share * steps))
        optim = replace(_scaled(base.optim, factor), warmup_steps=warmup_steps)
        if self.cool_down_share is None:
            return optim
        if not isinstance(optim.schedule, CoolDown):
            kind = type(optim.schedule).__name__
            raise InputError(
                f"rules.cool_down_share={self.cool_down_share} needs optim.schedule=CoolDown(...) "
                f"in the base config, not {kind}; remove the share or set this schedule."
            )
        schedule = replace(optim.schedule, steps=max(1, round(self.cool_down_share * steps)))
        return replace(optim, schedule=schedule)


def _scaled(optim: OptimConfig, factor: float) -> OptimConfig:
    """Multiply the learning rates, and round them to three digits."""
    peak = float(f"{optim.learning_rate * factor:.3g}")
    final = float(f"{optim.final_learning_rate * factor:.3g}")
    return replace(optim, learning_rate=peak, final_learning_rate=final)


@dataclass(frozen=True, kw_only=True)
class BranchesConfig:
    """Points as cool-down branches from one parent run for each model and seed.

    A parent run keeps the peak learning rate and evaluates nothing. A point equals, bit for bit, an
    uninterrupted run with that warmup-stable-decay (WSD) schedule.
    """

    share: float = 0.2  # Share of a point's steps in the cool-down.
    shape: Literal["linear", "sqrt", "power"] = "linear"  # Shape of the cool-down: see CoolDown.
    power: float = 1.0  # Exponent of the cool-down, used by the shape power.

    def __post_init__(self) -> None:
        check_ranges(self, "branches.", share="(0, 1)", power="(0, inf)")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of the trials of a point: one trial for every combination."""

    learning_rates: tuple[float, ...] = (1.0,)  # Learning rates, as multiples of the rules'.
    # Batch sizes; the number of steps changes to keep the samples. Empty: the point's own.
    batch_sizes: tuple[int, ...] = ()
    warmups: tuple[float, ...] = (1.0,)  # Numbers of warm-up steps, as multiples of the rules'.
    weight_decays: tuple[float, ...] = ()  # Weight decays. Empty: the base config's.

    def __post_init__(self) -> None:
        check_ranges(
            self,
            "sweep.",
            learning_rates="(0, inf)",
            batch_sizes="[2, inf)",
            warmups="[0, inf)",
            weight_decays="[0, inf)",
        )
        _check_distinct("sweep.learning_rates", self.learning_rates)
        _check_distinct("sweep.warmups", self.warmups)
        _check_distinct("sweep.batch_sizes", self.batch_sizes, least=0)
        _check_distinct("sweep.weight_decays", self.weight_decays, least=0)

    def trials(self, config: Config) -> Iterator[tuple[str, Config]]:
        """Yield a name suffix and a config for every combination at one batch size."""
        decays = self.weight_decays or (config.optim.weight_decay,)
        for factor, warmup, decay in itertools.product(self.learning_rates, self.warmups, decays):
            warmup_steps = round(warmup * config.optim.warmup_steps)
            if warmup_steps >= config.steps:
                raise InputError(
                    f"sweep.warmups={warmup:g} gives {warmup_steps} steps of warm-up in a run of "
                    f"{config.steps}; lower it or rules.max_warmup_share."
                )
            optim = _scaled(config.optim, factor)
            optim = replace(optim, warmup_steps=warmup_steps, weight_decay=decay)
            labels = [
                (self.learning_rates, f"rate{factor:g}"),
                (self.batch_sizes, f"batch{config.batch_size}"),
                (self.warmups, f"warmup{warmup:g}"),
                (decays, f"decay{decay:g}"),
            ]
            name = "".join(f"-{label}" for values, label in labels if len(values) > 1)
            yield name, replace(config, optim=optim)


@dataclass(frozen=True, kw_only=True)
class LadderConfig:
    """A grid of runs, models × teachers × samples × seeds, that share a base config.

    `runs` are others, such as those that differ in one setting each.
    """

    base: Config  # Shared config; points replace its model, steps, seeds and learning rates.
    # Models, by the name that their points get.
    models: Mapping[str, CLIPConfig] = field(default_factory=dict)
    samples: tuple[int, ...] = ()  # Numbers of pairs seen, each in one point's complete schedule.
    # Objectives with teachers, by the name that is added to the model's; "" adds none. Empty: the
    # base's objective. A live teacher needs its `model`, to count its FLOPs.
    teachers: Mapping[str, tuple[TermConfig, ...]] = field(default_factory=dict)
    batch_sizes: tuple[int, ...] = ()  # Batch size for each of `samples`. Empty: the base's.
    seeds: tuple[int, ...] = (0,)  # Random seeds for parameters and data order.
    rules: RulesConfig = field(default_factory=RulesConfig)
    branches: BranchesConfig | None = None  # Cool-down branches. None: full schedules.
    sweep: SweepConfig | None = None  # Trials per point. None: one, by the rules.
    # Runs beside the grid, by the name of their directory, trained as they are. `init_from` may be
    # the name of another one, which is trained before.
    runs: Mapping[str, Config] = field(default_factory=dict)
    hardware: tuple[HardwareConfig, ...] = ()  # Hardware to estimate hours for, each on its own.

    def __post_init__(self) -> None:
        check_ranges(self, samples="[1, inf)", batch_sizes="[2, inf)", seeds="[0, 4294967295]")
        if self.base.double_batch_at or self.base.lengths or self.base.stages:
            raise InputError(
                "base.double_batch_at, lengths, stages: all batches of a point are of one kind; "
                "remove them."
            )
        least = 0 if self.runs else 1
        _check_distinct("models", tuple(self.models), least)
        _check_distinct("samples", self.samples, least)
        _check_distinct("seeds", self.seeds)
        if self.batch_sizes and len(self.batch_sizes) != len(self.samples):
            raise InputError(
                f"batch_sizes={self.batch_sizes} must have one for each of samples={self.samples}."
            )
        if self.branches and self.sweep:
            raise InputError("branches and sweep cannot be combined; remove one of them.")
        if self.branches and len(set(self.batch_sizes)) > 1:
            raise InputError(
                f"batch_sizes={self.batch_sizes} must be equal, or remove branches: they share one."
            )


def _check_distinct(name: str, values: tuple[Any, ...], least: int = 1) -> None:
    if len(set(values)) < max(least, len(values)):
        raise InputError(f"{name}={values} must have no value twice, and at least one.")


def load_ladder(path: str | Path) -> LadderConfig:
    """Run a spec's `get_ladder()`. Raises InputError if the file has none."""
    return run_file(Path(path), "get_ladder", LadderConfig)
