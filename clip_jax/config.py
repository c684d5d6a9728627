"""The configuration of a training run, composed of the dataclasses of its parts.

A config file is Python with `get_config() -> Config`; flags override its fields by name.

A renamed field needs a function in `UPGRADES` of `checkpoints/run_config.py`, so that older runs
resume.
"""

import functools
import itertools
from dataclasses import dataclass, field, fields, replace
from typing import Any

from clip_jax import flops
from clip_jax.checkpoints.resume import branch_point
from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.data.batch_plan import BatchKind, BatchPlan, Lengths, doubling, in_stages
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
class StageConfig:
    """Settings that a run has from a share of its learning-rate schedule on."""

    begin: float  # Share of the learning-rate schedule before the stage.
    # Weight of each term of the objective; what no term trains keeps its values. None: that of the
    # objective.
    weights: tuple[float, ...] | None = None
    # Sequence length of a NaFlex model. None: model.vision.max_patches, or lengths.
    max_patches: int | None = None

    def __post_init__(self) -> None:
        check_ranges(self, "stages.", begin="[0, 1)", weights="[0, inf)", max_patches="[1, inf)")


@dataclass(frozen=True, kw_only=True)
class Config(StepConfig):
    """Settings of a training run."""

    stop_after: int | None = None  # Step at which to save and stop early; None: run to the end.
    # Steps after which the batch size doubles: 1000 3000 ends with four times batch_size.
    double_batch_at: tuple[int, ...] = ()
    # Sequence lengths of a NaFlex model in training. None: model.vision.max_patches throughout.
    lengths: Lengths | None = None
    # Parts of the run, which differ in the losses' weights or in the images' size. Before the first
    # one, the run has the config's own settings.
    stages: tuple[StageConfig, ...] = ()
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
    # Folder for compiled programs; None: in the run directory, on CPUs in the user's cache.
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
        if self.stages:
            self._check_stages()
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

    def _check_stages(self) -> None:
        """Raise InputError unless the stages follow each other and fit objective and model."""
        begins, first = [stage.begin for stage in self.stages], self.first_steps
        if any(a >= b for a, b in itertools.pairwise((*first, self.steps))):
            raise InputError(
                f"stages.*.begin={begins} must increase, and each stage have a step: they begin at "
                f"{list(first)} of {self.steps} steps. Change them, or --steps."
            )
        terms = [term.name for term in self.objective]
        for number, stage in enumerate(self.stages):
            weights = stage.weights
            if weights is not None and (len(weights) != len(terms) or not any(weights)):
                raise InputError(
                    f"stages.{number}.weights={weights} must have a weight for each term of the "
                    f"objective ({', '.join(terms)}), at least one of them not 0."
                )
            if stage.max_patches and (self.lengths or self.model.vision.max_patches is None):
                raise InputError(
                    f"stages.{number}.max_patches={stage.max_patches} needs a NaFlex model and no "
                    "lengths: set --model.vision.max-patches, or remove one of them."
                )

    @functools.cached_property
    def _all_stages(self) -> tuple[StageConfig, ...]:
        """All stages, of which the first begins at step 0."""
        begins = bool(self.stages) and not self.stages[0].begin
        return self.stages if begins else (StageConfig(begin=0.0), *self.stages)

    @functools.cached_property
    def first_steps(self) -> tuple[int, ...]:
        """The number of steps before each stage."""
        end = self.schedule_step(self.steps)
        at = [stage.begin * end for stage in self._all_stages]
        if self.lengths is not None:
            at = [self.lengths.step_at(step, self.steps) for step in at]
        return tuple(map(round, at))

    def stages_before(self, step: int) -> dict[int, StageConfig]:
        """Return the stages that begin before `step`, by the number of steps before each."""
        stages = zip(self.first_steps, self._all_stages, strict=True)
        return {first: replace(stage, begin=0.0) for first, stage in stages if 0 < first < step}

    def stage_of(self, kind: BatchKind) -> StageConfig:
        """Return the stage of one kind of batches."""
        return self._all_stages[(kind.stage or 1) - 1]

    @property
    def end(self) -> int:
        """The step at which the run stops."""
        return min(self.steps, self.stop_after or self.steps)

    @functools.cached_property
    def batches(self) -> BatchPlan:
        """The size, the image shape and the stage of every batch of the run."""
        vision = self.model.vision

        def spec_of(patches: int | None) -> ImageSpec:
            return vision.with_max_patches(patches).image_spec

        if self.lengths is None:
            plan = doubling(self.batch_size, vision.image_spec, self.double_batch_at)
        else:
            patches, seed = vision.num_patches, self.data.seed
            plan = self.lengths.plan(self.batch_size, patches, spec_of, self.steps, seed)
        if not self.stages:
            return plan
        own = [stage.max_patches for stage in self._all_stages]
        images = [None if patches is None else spec_of(patches) for patches in own]
        return in_stages(plan, self.first_steps, images)

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
        weights = self.stage_of(kind).weights or [term.weight for term in self.objective]
        return self._recipe(
            batch_size=kind.pairs,
            model=kind.model_of(self.model),
            objective=tuple(
                replace(term, weight=weight)
                for term, weight in zip(self.objective, weights, strict=True)
            ),
        )

    def _recipe(self, **changes: Any) -> Recipe:
        settings: dict[str, Any] = {x.name: getattr(self, x.name) for x in fields(StepConfig)}
        settings["steps"] = round(self.schedule_step(self.steps))
        return Recipe(**(settings | changes))

    def variants(self) -> list[tuple[BatchKind, int, Recipe]]:
        """Return each kind of batch in the run, with the number of its steps and its recipe."""
        counts = self.batches.counts(0, self.steps)
        return [(kind, steps, self.recipe_of(kind)) for kind, steps in counts.items()]
