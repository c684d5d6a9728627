"""The configuration of a training run, composed of the dataclasses of its parts.

A config file is Python with `get_config() -> Config`; flags override its fields by name.

A renamed field needs a function in `UPGRADES` of `checkpoints/run_config.py`, so that older runs
resume.
"""

import functools
import itertools
from dataclasses import dataclass, field, fields
from typing import Any

from clip_jax import flops
from clip_jax.checkpoints.resume import branch_point
from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.data.batch_plan import BatchKind, BatchPlan, Lengths, doubling
from clip_jax.data.images import Preprocess
from clip_jax.data.pipeline import DataConfig
from clip_jax.errors import InputError, check_ranges
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.evaluator import check_distinct
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.metrics.profiler import profile_range
from clip_jax.models.images import ImageSpec
from clip_jax.optim import Tower
from clip_jax.processes import ProcessesConfig
from clip_jax.sharding import MeshConfig
from clip_jax.step import Recipe, StepConfig


@dataclass(frozen=True, kw_only=True)
class Config(StepConfig):
    """Settings of a training run."""

    stop_after: int | None = None  # Step at which to save and stop early; None: run to the end.
    # Steps after which the batch size doubles: 1000 3000 ends with four times batch_size.
    double_batch_at: tuple[int, ...] = ()
    # Sequence lengths of a NaFlex model in training. None: model.vision.max_patches throughout.
    lengths: Lengths | None = None
    # Parent run and step, as RUN@STEP: continues from that state and data position, under another
    # schedule or length. init_from stays that of the parent run. None: no branch.
    branch_from: str | None = None
    # Initial weights: run, model folder, weight file, or icons, the bundled model. None: random.
    init_from: str | None = None
    init_towers: tuple[Tower, ...] = ("image", "text")  # Towers to load from init_from.
    init_architecture: bool = False  # Take the architecture and preprocessing of init_from.
    # Settings in which the model may differ from init_from, as names or patterns such as
    # vision.activation, text.* or image_mean. Others are an error.
    init_differences: tuple[str, ...] = ()
    # Resizing of images for evaluation, in the model's size. None: OpenAI's.
    preprocess: Preprocess | None = None
    report_every: int = 100  # Steps between reports in metrics.jsonl, TensorBoard and the terminal.
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)
    # Evaluators that run during training.
    evals: tuple[DigitsEvalConfig | PairsEvalConfig | SuiteEvalConfig, ...] = ()
    # Weights & Biases project to log the run to. None: no logging. Needs the extra `wandb`.
    wandb_project: str | None = None
    profile_steps: str | None = None  # Steps to trace for xprof, as FIRST:LAST (10:15); None: none.
    # Folder for compiled programs; None: in the run directory, on CPUs no cache.
    compilation_cache: str | None = None

    def __post_init__(self) -> None:
        check_ranges(
            self,
            seed="[0, 4294967295]",
            steps="[1, 2147483647]",
            batch_size="[2, inf)",
            accumulation="[1, inf)",
            report_every="[1, inf)",
            double_batch_at="[1, inf)",
            stop_after="[1, inf)",
        )
        if any(a >= b for a, b in itertools.pairwise((*self.double_batch_at, self.steps))):
            raise InputError(
                f"double_batch_at={self.double_batch_at} must increase and stay below steps="
                f"{self.steps}; change --double-batch-at or --steps."
            )
        vision = self.model.vision
        group = vision.batch_norm_group
        if self.accumulation > 1 and group is None:
            raise InputError(
                f"accumulation={self.accumulation} would compute BatchNorm over chunks instead of "
                "the batch; set model.vision.batch_norm_group to the number of rows that share it."
            )
        if self.batch_size % (self.accumulation * (group or 1)):
            raise InputError(
                f"batch_size={self.batch_size} must be a multiple of accumulation="
                f"{self.accumulation} × {group or 1} (model.vision.batch_norm_group)."
            )
        if self.lengths is not None:
            if vision.max_patches is None or self.double_batch_at:
                raise InputError(
                    "lengths needs a NaFlex model and no double_batch_at: set "
                    "--model.vision.max-patches to the default number of patches, or remove "
                    "--lengths."
                )
            self.lengths.check(self.batch_size, vision.max_patches, self.accumulation)
        if self.branch_from is not None:
            _, step = branch_point(self.branch_from)
            if step >= self.steps:
                raise InputError(
                    f"branch_from={self.branch_from} is not before steps={self.steps}, which "
                    "includes the parent run's steps; raise --steps or branch earlier."
                )
        if (self.init_architecture or self.init_differences or self.lora) and not self.init_from:
            raise InputError(
                "init_architecture, init_differences and lora need trained weights: set "
                "--init-from."
            )
        if self.stored is not None:
            if not self.init_from or self.stored not in self.init_towers:
                raise InputError(
                    f"stored={self.stored} needs the weights of that tower, which evaluations and "
                    "exports compute: set --init-from, and name the tower in --init-towers."
                )
            if self.lengths is not None and self.stored == "image":
                raise InputError(
                    "lengths needs images, and stored=image reads none: remove one of them."
                )
        if self.lora is not None and len(self.init_towers) < 2:
            raise InputError("lora needs the weights of both towers: omit --init-towers.")
        check_distinct(self.evals)
        if self.profile_steps is not None:
            profile_range(self.profile_steps)

    @property
    def end(self) -> int:
        """The step at which the run stops."""
        return min(self.steps, self.stop_after or self.steps)

    @functools.cached_property
    def batches(self) -> BatchPlan:
        """The size and image shape of every batch of the run."""
        vision = self.model.vision
        if self.lengths is None:
            return doubling(self.batch_size, vision.image_spec, self.double_batch_at)

        def spec_of(patches: int | None) -> ImageSpec:
            return vision.with_max_patches(patches).image_spec

        patches, seed = vision.num_patches, self.data.seed
        return self.lengths.plan(self.batch_size, patches, spec_of, self.steps, seed)

    def samples_after(self, steps: int) -> int:
        """Return the number of image-text pairs in the first `steps` updates."""
        return self.batches.samples_after(steps)

    def flops_after(self, steps: int) -> int:
        """Return the model FLOPs of the first `steps` updates."""
        counts = self.batches.counts(0, steps)
        return sum(flops.of_step(self.recipe_of(kind)).total * n for kind, n in counts.items())

    def schedule_step(self, step: float) -> float:
        """Return the step of the learning-rate schedule after `step` updates (see `lengths`)."""
        return self.lengths.schedule_step(step, self.steps) if self.lengths else step

    @property
    def recipe(self) -> Recipe:
        """The settings that determine an update, apart from the data and the mesh."""
        return self._recipe()

    def recipe_of(self, kind: BatchKind) -> Recipe:
        """Return the recipe of the updates that take one kind of batches."""
        return self._recipe(batch_size=kind.pairs, model=kind.model_of(self.model))

    def _recipe(self, **changes: Any) -> Recipe:
        settings: dict[str, Any] = {x.name: getattr(self, x.name) for x in fields(StepConfig)}
        settings["steps"] = round(self.schedule_step(self.steps))
        return Recipe(**(settings | changes))

    def variants(self) -> list[tuple[int, Recipe]]:
        """Return the number of steps and the recipe of each kind of batch in the run."""
        counts = self.batches.counts(0, self.steps)
        return [(steps, self.recipe_of(kind)) for kind, steps in counts.items()]
