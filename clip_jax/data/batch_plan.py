"""The kind of every batch of a run: its size, the shape of its images, and its stage.

Kinds are functions of the config and the step alone, so all processes know them without
communication, and a resumed run continues with the same batches.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from clip_jax.errors import InputError, check_ranges
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.images import ImageSpec

_LENGTHS = (128, 256, 576, 784, 1024)  # SigLIP 2 paper, 2.4.2
_DRAWS = 2**63  # of the random numbers of lengths; those of samples have their positions


class BatchKind(NamedTuple):
    """All that makes another program of the step than the run's config alone.

    The kind of a batch is a pure function of config and step. Every kind has its own compiled
    program and its own model (`model_of`), but all share one state: the models of all kinds have
    the same parameters, of the same shapes. A further field that makes another program has a
    default that leaves the model as it is.
    """

    pairs: int  # global batch size
    images: ImageSpec
    patch_size: int | None = None  # of the image tower, in pixels; None: the model's own
    stage: int | None = None  # from 1, as in `Config.stage_of`; None: the run has no stages

    @property
    def max_patches(self) -> int | None:
        """Sequence length of a NaFlex model; None: images of a fixed resolution."""
        return self.images.max_patches

    def model_of(self, model: CLIPConfig) -> CLIPConfig:
        """Return a run's model as it takes this kind of batch."""
        vision = model.vision.with_max_patches(self.max_patches)
        if self.patch_size is not None:
            vision = vision.with_patch_size(self.patch_size)
        return replace(model, vision=vision)

    def describe(self) -> str:
        """Return such as "512 pairs of 256 patches in stage 2"."""
        images = f"{self.max_patches} patches" if self.max_patches else "a fixed resolution"
        sizes = "" if self.patch_size is None else f" of {self.patch_size} pixels"
        stage = "" if self.stage is None else f" in stage {self.stage}"
        return f"{self.pairs:,} pairs of {images}{sizes}{stage}"

    def metrics(self) -> dict[str, int]:
        """Return what tells this kind from others in the metrics of a step."""
        values = {
            "tokens": self.max_patches,
            "patch_size": self.patch_size,
            "stage": self.stage,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The batches of a run, in segments of consecutive batches of one kind."""

    kinds: tuple[BatchKind, ...]
    begin: Int64[np.ndarray, " segments"]  # step at which each begins, from 0; the last has no end
    kind: Int64[np.ndarray, " segments"]  # index of its kind

    @functools.cached_property
    def unit(self) -> int:
        """Number of pairs of which every batch has a multiple."""
        return math.gcd(*(kind.pairs for kind in self.kinds))

    @functools.cached_property
    def _units(self) -> Int64[np.ndarray, " kinds"]:
        return np.array([kind.pairs // self.unit for kind in self.kinds], np.int64)

    @functools.cached_property
    def _before(self) -> Int64[np.ndarray, " segments"]:
        """Units before each segment."""
        return np.cumsum([0, *(np.diff(self.begin) * self._units[self.kind[:-1]])])

    def at(self, step: int) -> BatchKind:
        """Return the kind of the batch that follows the first `step` batches."""
        return self.kinds[self.kind[np.searchsorted(self.begin, step, "right") - 1]]

    def units_before(self, step: int) -> int:
        """Count the units in the first `step` batches."""
        i = np.searchsorted(self.begin, step, "right") - 1
        return int(self._before[i] + (step - self.begin[i]) * self._units[self.kind[i]])

    def samples_after(self, steps: int) -> int:
        """Count the pairs in the first `steps` batches."""
        return self.unit * self.units_before(steps)

    def locate(self, unit: int) -> tuple[int, int, BatchKind]:
        """Return the step whose batch has a unit, the unit's index in it, and the batch's kind."""
        i = np.searchsorted(self._before, unit, "right") - 1
        step, index = divmod(unit - int(self._before[i]), int(self._units[self.kind[i]]))
        return int(self.begin[i]) + step, index, self.kinds[self.kind[i]]

    def counts(self, begin: int, end: int) -> dict[BatchKind, int]:
        """Count the batches of each kind from step `begin` up to `end`."""
        edges = np.clip([*self.begin, end], begin, max(begin, end))
        counts = np.bincount(self.kind, np.diff(edges), len(self.kinds))
        return {kind: int(n) for kind, n in zip(self.kinds, counts, strict=True) if n}


def in_stages(
    plan: BatchPlan, first_steps: Sequence[int], images: Sequence[ImageSpec | None]
) -> BatchPlan:
    """Return a plan with the stage of each batch.

    `first_steps` of the stages increase from 0. `images` replaces the image shape in a stage, if it
    is not None.
    """
    begin = np.union1d(plan.begin, first_steps)
    kind = plan.kind[np.searchsorted(plan.begin, begin, "right") - 1]
    stage = np.searchsorted(first_steps, begin, "right") - 1
    both, index = np.unique(np.stack([stage, kind]), axis=1, return_inverse=True)
    kinds = (
        plan.kinds[kind]._replace(stage=stage + 1, images=images[stage] or plan.kinds[kind].images)
        for stage, kind in both.T.tolist()
    )
    return BatchPlan(tuple(kinds), begin, index.ravel())


def constant(batch_size: int, images: ImageSpec) -> BatchPlan:
    """Return a plan of equal batches."""
    return doubling(batch_size, images, ())


def doubling(batch_size: int, images: ImageSpec, doubled_at: Sequence[int]) -> BatchPlan:
    """Return a plan whose batch size doubles after some steps (arXiv:1711.00489)."""
    kinds = tuple(BatchKind(batch_size << i, images) for i in range(len(doubled_at) + 1))
    return BatchPlan(kinds, np.array([0, *doubled_at], np.int64), np.arange(len(kinds)))


@dataclass(frozen=True, kw_only=True)
class SigLIP2Lengths:
    """SigLIP 2's schedule (2.4.2): a fixed resolution first, at the end a length drawn per batch.

    Batches of the longest length have half of batch_size and come in pairs.
    """

    patches: tuple[int, ...] = _LENGTHS  # Sequence lengths, drawn with equal probability.
    fixed_share: float = 0.9  # Share of the learning-rate schedule at the fixed resolution.
    stretch: float = 3.75  # Factor on the steps of the rest of the learning-rate schedule.

    def __post_init__(self) -> None:
        check_ranges(self, "lengths.", patches="[1, inf)", fixed_share="[0, 1)", stretch="[1, inf)")
        _check_distinct(self.patches)

    def check(self, batch_size: int, max_patches: int, accumulation: int) -> None:
        """Raise InputError unless the batch size can be halved."""
        if batch_size % (2 * accumulation):
            raise InputError(
                f"batch_size={batch_size} must be a multiple of 2 × accumulation={accumulation}, "
                "since lengths halves it for the longest sequences; change --batch-size."
            )

    def first_step(self, steps: int) -> int:
        """Return the step of the first drawn length, of so many steps in the run."""
        rest = self.stretch * (1 - self.fixed_share)
        return min(round(steps * self.fixed_share / (self.fixed_share + rest)), steps - 1)

    def schedule_step(self, step: float, steps: int) -> float:
        """Return the step of the learning-rate schedule that a step of the run has."""
        first = self.first_step(steps)
        return step if step < first else first + (step - first) / self.stretch

    def step_at(self, schedule_step: float, steps: int) -> float:
        """Return the step of the run that has a step of the learning-rate schedule."""
        first = self.first_step(steps)
        return min(schedule_step, first) + self.stretch * max(schedule_step - first, 0)

    def plan(
        self,
        batch_size: int,
        max_patches: int,
        spec_of: Callable[[int | None], ImageSpec],
        steps: int,
        seed: int,
    ) -> BatchPlan:
        """Return the batches of a run; `spec_of` gives the image shape of a sequence length."""
        first, longest = self.first_step(steps), max(self.patches)
        kinds = [
            BatchKind(batch_size // 2 if n == longest else batch_size, spec_of(n))
            for n in self.patches
        ]
        drawn = _rng(seed).integers(len(kinds), size=steps - first)
        each = np.where(drawn == self.patches.index(longest), 2, 1)
        begin = first + np.cumsum(each) - each
        fixed = BatchKind(batch_size, spec_of(None))
        if not first:
            return BatchPlan(tuple(kinds), begin[begin < steps], drawn[begin < steps])
        begin, drawn = np.array([0, *begin[begin < steps]]), drawn[begin < steps] + 1
        return BatchPlan((fixed, *kinds), begin, np.array([0, *drawn]))


@dataclass(frozen=True, kw_only=True)
class TokenBudget:
    """Batches of about equal numbers of patches, batch_size × model.vision.max_patches."""

    patches: tuple[int, ...] = _LENGTHS  # Sequence lengths, one drawn for each batch.
    shares: tuple[float, ...] | None = None  # Probability of each length. None: equal ones.
    # Divisor of all batch sizes: a multiple of the mesh's batch shards × accumulation.
    multiple: int = 64

    def __post_init__(self) -> None:
        check_ranges(self, "lengths.", patches="[1, inf)", shares="(0, 1]", multiple="[1, inf)")
        _check_distinct(self.patches)
        shares = self.shares or (1.0,)
        if len(self.shares or self.patches) != len(self.patches) or abs(sum(shares) - 1) > 1e-6:
            raise InputError(
                f"lengths.shares={self.shares} must be one probability for each of lengths.patches="
                f"{self.patches}, with sum 1."
            )

    def size(self, batch_size: int, max_patches: int, patches: int) -> int:
        """Return the batch size of a sequence length."""
        return batch_size * max_patches // patches // self.multiple * self.multiple

    def check(self, batch_size: int, max_patches: int, accumulation: int) -> None:
        """Raise InputError unless each length has a batch size that accumulation can divide."""
        longest = max(self.patches)
        if self.multiple % accumulation or not self.size(batch_size, max_patches, longest):
            raise InputError(
                f"batch_size={batch_size} × model.vision.max_patches={max_patches} patches are "
                f"{batch_size * max_patches // longest} images of {longest} patches; they must be "
                f"at least lengths.multiple={self.multiple}, a multiple of accumulation="
                f"{accumulation}. Change --batch-size or --lengths.multiple."
            )

    def schedule_step(self, step: float, steps: int) -> float:
        """Return the step of the learning-rate schedule, which is the run's."""
        return step

    def step_at(self, schedule_step: float, steps: int) -> float:
        """Return the step of the run, which is that of the learning-rate schedule."""
        return schedule_step

    def plan(
        self,
        batch_size: int,
        max_patches: int,
        spec_of: Callable[[int | None], ImageSpec],
        steps: int,
        seed: int,
    ) -> BatchPlan:
        """Return the batches of a run; `spec_of` gives the image shape of a sequence length."""
        kinds = [BatchKind(self.size(batch_size, max_patches, n), spec_of(n)) for n in self.patches]
        shares = self.shares or [1 / len(kinds)] * len(kinds)
        drawn = np.searchsorted(np.cumsum(shares)[:-1], _rng(seed).random(steps), "right")
        return BatchPlan(tuple(kinds), np.arange(steps), drawn)


Lengths = SigLIP2Lengths | TokenBudget


def _check_distinct(patches: tuple[int, ...]) -> None:
    if not patches or len(set(patches)) < len(patches):
        raise InputError(f"lengths.patches={patches} must be one or more different numbers.")


def _rng(seed: int) -> np.random.Generator:
    key: Any = [seed, _DRAWS]
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
