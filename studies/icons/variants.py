"""What helps: runs that differ from base.py in one setting each, at equal training FLOPs.

    clip-jax scale ladder studies/icons/variants.py --jobs 2
    python studies/icons/what_helps.py runs/variants studies/icons/results

Hardware: two CPU cores, five to six hours; each run has one core. The same command resumes.
Recipe: base.py; three seeds. A variant whose step costs fewer FLOPs takes more steps: as many as
the FLOPs of a run of base.py pay for, by `Config.flops_after`.
Notes: With `ICONS_TEACHER=RUN`, a run or a model folder, there are also `distilled` and
`locked_teacher`. The forward passes of the teacher and of locked towers are counted, their own
training is not. The FLOPs of an optimizer's update are not counted; Muon's cost more time than
AdamW's. Learning rates were chosen for `base`, and for AdamW with the first seed.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import clip_jax
from clip_jax.config import Config, StageConfig
from clip_jax.config_files import load_config
from clip_jax.data.sources import SourceConfig, StoredSource
from clip_jax.data.sources.any import PathConfig
from clip_jax.losses import (
    CaptionConfig,
    DistillationConfig,
    LiveTeacher,
    MaskedPredictionConfig,
    SelfDistillationConfig,
    SigmoidConfig,
    SoftmaxConfig,
)
from clip_jax.models.cappa import CapPaConfig
from clip_jax.models.decoder import CoCaConfig
from clip_jax.optim import AdamW, Constant, CoolDown, Cosine
from clip_jax.optim.wrappers import Tower
from clip_jax.scaling.ladder import HardwareConfig, LadderConfig

STUDY = Path(__file__).parent
TEMPLATES = (STUDY / "templates.txt").read_text(encoding="utf-8").splitlines()
SEEDS = (0, 1, 2)
AT_THE_END = 1_000_000  # steps between evaluations; the last step is always evaluated
COOL_DOWN = 0.25  # of a run's steps
LAST = (0.8, 0.85, 0.9, 0.95)  # of a run's steps: checkpoints to average with the last one
WIDTHS = (32, 64)  # of embeddings, besides the complete ones
SMALL_SHARE = 0.5  # of the FLOPs at the small resolution
HEAD: dict[str, Any] = {"hidden": 256, "bottleneck": 64, "prototypes": 1_024, "flip": 0.0}
SELF_TAUGHT = 0.8  # share of the steps before self-supervised losses
RATES = {  # of AdamW besides 1e-3, and their seeds; 5e-4 is the best with the first seed
    "2.5e-4": SEEDS[:1],
    "5e-4": SEEDS,
    "2e-3": SEEDS[:1],
    "4e-3": SEEDS[:1],
}

LABELS = {
    "base": "base: softmax, Muon, words of style",
    "sigmoid": "sigmoid instead of softmax",
    "sigmoid_causal": "sigmoid, and captions token by token",
    "sigmoid_parallel": "sigmoid, and captions, half of them in parallel (SigLIP 2)",
    "sigmoid_crops": "sigmoid, and self-distillation from 80% of the steps",
    "sigmoid_masked": "sigmoid, and masked prediction from 80% of the steps",
    "sigmoid_both": "sigmoid, and both from 80% of the steps (SigLIP 2)",
    "unmasked": "equal captions are negatives",
    "no_style": "captions without words of style",
    "dropout": "patch dropout 0.5",
    "small_first": "16 pixels for half of the FLOPs",
    "adamw": "AdamW instead of Muon, learning rate 1e-3",
    **{f"adamw_{rate}": f"the same, learning rate {rate}" for rate in RATES},
    "distilled": "distillation",
    "decoder": "caption decoder",
    "widths": "losses of the first 32 and 64 channels, too (Matryoshka)",
    "locked_image": "image tower of `base`, locked; the text tower is trained",
    "locked_text": "text tower of `base`, locked; the image tower is trained",
    "locked_teacher": "image tower of the released model, locked",
    "cosine": "cosine instead of a cool-down",
    "average": "moving average of the weights",
    "checkpoints": "average of the last five checkpoints",
    "constant": "constant learning rate",
    "constant_checkpoints": "the same, average of the last five",
}


@dataclass(frozen=True, kw_only=True)
class WithoutStyle(SourceConfig):
    """Icons whose captions are their names alone, without words of their style."""

    path: str  # Folder that `clip-jax prepare` has written.

    def open(self, image_size: int, process: tuple[int, int]) -> "Names":
        """Open the folder."""
        return Names(PathConfig(path=self.path).open(image_size, process))


class Names:
    """A source of the same icons, in which each caption is a template of a name."""

    def __init__(self, source: StoredSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def key(self, index: int) -> str:
        return self.source.key(index)

    def load(self, index: int, rng: np.random.Generator) -> tuple[bytes, str]:
        record = self.source.record(index)
        captions = without_style(record.captions())
        return record.image(), captions[rng.integers(len(captions))]


def without_style(captions: list[str]) -> list[str]:
    """Leave out captions with words of style: a name is one that all its templates follow."""
    count = len(TEMPLATES)
    groups = (captions[i : i + count] for i in range(len(captions)))
    return [text for group in groups if group == of_name(group[0]) for text in group]


def of_name(name: str) -> list[str]:
    return [template.replace("{}", name) for template in TEMPLATES]


def base_config() -> Config:
    """Return base.py for one core, with checkpoints to average, and evaluated at the end alone."""
    base = load_config(STUDY / "base.py")
    return replace(
        base,
        data=replace(base.data, threads=1),
        checkpoint=replace(base.checkpoint, every_steps=100, keep=1),
        evals=tuple(replace(evaluator, every_steps=AT_THE_END) for evaluator in base.evals),
    )


def variants(base: Config, teacher: str | None = None) -> Mapping[str, Config]:
    """Return a config for each variant; the number of steps is still that of `base`."""
    model, optim = base.model, base.optim
    vision, text = model.vision, model.text

    def with_objective(*terms, **changes) -> Config:
        return replace(base, objective=terms, model=replace(model, **changes))

    def with_optim(**changes) -> Config:
        return replace(base, optim=replace(optim, **changes))

    def with_captions(*terms, parallel: float, **changes) -> Config:
        decoder = CapPaConfig(
            width=text.width, depth=text.depth // 2, num_heads=text.num_heads, parallel=parallel
        )
        return with_objective(*terms, CaptionConfig(weight=1.0), decoder=decoder, **changes)

    def with_teacher(crops: float = 0.0, masked: float = 0.0) -> Config:
        terms = (
            sigmoid,
            SelfDistillationConfig(weight=0.0, view_size=vision.image_size // 2, **HEAD),
            MaskedPredictionConfig(weight=0.0, **HEAD),
        )
        stage = StageConfig(begin=SELF_TAUGHT, weights=(1.0, crops, masked))
        return replace(with_objective(*terms, **of_sigmoid), stages=(stage,))

    softmax = SoftmaxConfig(mask_same_caption=True)
    sigmoid = SigmoidConfig(mask_same_caption=True)
    of_sigmoid = {"init_logit_scale": 10.0, "init_logit_bias": -10.0}
    table = {
        "base": base,
        "sigmoid": with_objective(sigmoid, **of_sigmoid),
        "sigmoid_causal": with_captions(sigmoid, parallel=0.0, **of_sigmoid),
        "sigmoid_parallel": with_captions(sigmoid, parallel=0.5, **of_sigmoid),
        "sigmoid_crops": with_teacher(crops=1.0),
        "sigmoid_masked": with_teacher(masked=0.25),
        "sigmoid_both": with_teacher(crops=1.0, masked=0.25),
        "cappa": with_captions(parallel=0.75, vision=replace(vision, pool="mean")),
        "unmasked": with_objective(SoftmaxConfig()),
        "widths": with_objective(replace(softmax, widths=WIDTHS)),
        "decoder": with_objective(
            softmax,
            CaptionConfig(weight=1.0),
            vision=replace(vision, pool="queries", pool_queries=17, pool_heads=4),
            text=replace(text, pool="class_token"),
            decoder=CoCaConfig(depth=2, num_heads=text.num_heads),
        ),
        "no_style": replace(
            base, data=replace(base.data, source=WithoutStyle(path=base.data.source.path))
        ),
        "dropout": with_objective(softmax, vision=replace(vision, patch_dropout=0.5)),
        "adamw": with_optim(optimizer=AdamW(), learning_rate=1e-3),
        "cosine": with_optim(schedule=Cosine()),
        "constant": with_optim(schedule=Constant()),
        "average": with_optim(ema_decay=0.99),
    }
    for rate, seeds in RATES.items():
        if base.seed in seeds:
            table[f"adamw_{rate}"] = with_optim(optimizer=AdamW(), learning_rate=float(rate))
    if teacher:
        architecture = clip_jax.load(teacher).clip.config
        live = LiveTeacher(weights=teacher, model=architecture, dtype="float32")
        taught = DistillationConfig(weight=0.75, teachers=(live,))
        table["distilled"] = with_objective(replace(softmax, weight=0.25), taught)
        other = replace(model, vision=architecture.vision, embed_dim=architecture.embed_dim)
        table["locked_teacher"] = with_locked(replace(base, model=other), "image", teacher)
    return table


def with_locked(config: Config, tower: Tower, source: str) -> Config:
    """Take a tower of another run or model, and lock it."""
    optim = replace(config.optim, locked=(tower,))
    return replace(config, init_from=source, init_towers=(tower,), optim=optim)


def locked(base: Config, seed: int) -> dict[str, Config]:
    """Return runs with a locked tower of the run of `base` with the same seed."""
    towers: tuple[Tower, ...] = ("image", "text")
    total = base.flops_after(base.steps)
    return {
        f"locked_{tower}-seed{seed}": of_equal_flops(
            with_locked(base, tower, f"base-seed{seed}"), total
        )
        for tower in towers
    }


def small_first(base: Config, seed: int) -> dict[str, Config]:
    """Return a run at half the resolution, and the run at the full one that begins from it."""
    vision = replace(base.model.vision, image_size=base.model.vision.image_size // 2)
    small = replace(
        base,
        model=replace(base.model, vision=vision),
        optim=replace(base.optim, schedule=Constant()),
        evals=(),
    )
    full = replace(
        base,
        init_from=f"small-seed{seed}",
        init_differences=("vision.image_size",),
        optim=replace(base.optim, warmup_steps=base.optim.warmup_steps // 2),
    )
    total = base.flops_after(base.steps)
    return {
        f"small-seed{seed}": of_equal_flops(small, SMALL_SHARE * total),
        f"small_first-seed{seed}": of_equal_flops(full, (1 - SMALL_SHARE) * total),
    }


def of_equal_flops(config: Config, flops: float) -> Config:
    """Set the steps to as many as the FLOPs pay for."""
    steps = round(flops / (config.flops_after(config.steps) / config.steps))
    optim = config.optim
    if isinstance(optim.schedule, CoolDown):
        schedule = replace(optim.schedule, steps=round(COOL_DOWN * steps))
        config = replace(config, optim=replace(optim, schedule=schedule))
    also = tuple(round(share * steps) for share in LAST)
    return replace(config, steps=steps, checkpoint=replace(config.checkpoint, also=also))


def get_ladder() -> LadderConfig:
    base = base_config()
    flops = base.flops_after(base.steps)
    runs = {}
    for seed in SEEDS:
        seeded = replace(base, seed=seed, data=replace(base.data, seed=seed))
        for name, config in variants(seeded, os.environ.get("ICONS_TEACHER")).items():
            runs[f"{name}-seed{seed}"] = of_equal_flops(config, flops)
        runs |= small_first(seeded, seed)
        runs |= locked(seeded, seed)
    core = HardwareConfig(chip="CPU core", peak_flops=100e9, mfu=0.45, start_seconds=60)
    return LadderConfig(base=base, runs=runs, hardware=(core,))
