"""CoCa with ViT-B/32, open_clip's architecture: contrastive and caption loss in one run.

    clip-jax train coca_b32 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan coca_b32 --topology v5e:16x16

Hardware: one v5e-256 slice; 19 hours (compiled, not run). It takes 6.5 of 16 GB per chip; MFU
is at most 45% by the sequential bound.
Recipe: weight 1 for the contrastive loss and 2 for the caption loss (CoCa, section 4.1). The rest
is the CLIP paper's, as in `vit_b32`.
Expected: unknown; nobody has trained this config yet.
Notes: The mesh has only a `data` axis. The decoder takes 55% of a pair's FLOPs. The class token's
mask is the one that open_clip released, so that weights can be converted in both directions;
`--model.text.correct-class-mask True` trains with the correct mask.
"""

import dataclasses

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import CaptionConfig, SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        steps=390_625,
        batch_size=32_768,
        model=dataclasses.replace(zoo.get("coca_ViT-B-32"), remat="attention"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(), CaptionConfig(weight=2.0)),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=2_000),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
