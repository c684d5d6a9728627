"""The grid of the LAION and DataComp papers: ViT-S/32 to H/14, 1.28M to 34B pairs seen.

    clip-jax scale ladder ladder_datacomp --dry-run
    clip-jax scale ladder ladder_datacomp --jobs 0       # writes the runs' configs
    clip-jax train runs/ladder_datacomp/ViT-B-32@128M-seed0/config.json

Hardware: 1e23 training FLOPs for the whole grid; one v5e-256 slice takes 1,177 hours at an assumed
45% MFU. Begin with the small corner (`--only 'ViT-[SMB]-32@*M-*'`).
Recipe: batch sizes of DataComp (4,096 for its small and medium scale, 8,192 for large) and of
Cherti et al. (88,064). One rule sets all learning rates. They are within a factor of the papers':
DataComp 5e-4 and 1e-3 (xlarge), Cherti et al. 1e-3 from B/32 to L/14 and 5e-4 for H/14.
Notes: Copy this file with `clip-jax configs ladder_datacomp > mine.py` and set the paths of its two
data sources to your shards. On pods, run `scale ladder` on every host of every slice: they share a
queue, and the same command resumes. The MFU is an assumption; set your own.
"""

import dataclasses

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.models import zoo
from clip_jax.optim import OptimConfig
from clip_jax.scaling.ladder import HardwareConfig, LadderConfig, RulesConfig

MODELS = ("ViT-S-32", "ViT-M-32", "ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14")
SAMPLES = {  # pairs seen: pairs a step
    1_280_000: 1_024,
    12_800_000: 4_096,
    128_000_000: 4_096,
    1_280_000_000: 8_192,
    2_560_000_000: 88_064,
    12_800_000_000: 88_064,
    34_000_000_000: 88_064,
}


def get_ladder() -> LadderConfig:
    held_out = DataConfig(source=TarConfig(path="held_out/*.tar"), crop="center", threads=16)
    return LadderConfig(
        base=Config(
            batch_size=88_064,
            data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=2_000),
            checkpoint=CheckpointConfig(every_steps=1_000),
            evals=(
                PairsEvalConfig(data=held_out, pairs=32_768, every_steps=10_000),
                SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),
            ),
        ),
        models={name: dataclasses.replace(zoo.get(name), remat="hidden") for name in MODELS},
        samples=tuple(SAMPLES),
        batch_sizes=tuple(SAMPLES.values()),
        rules=RulesConfig(batch_exponent=0.25, reference_width=768, width_exponent=-0.5),
        hardware=(
            HardwareConfig(chip="TPU v5e", chips=256, mfu=0.45, start_seconds=300),
            HardwareConfig(chip="H100 SXM", chips=64, mfu=0.40, start_seconds=300),
        ),
    )
