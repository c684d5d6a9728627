"""CoCa with ViT-L/14, open_clip's architecture: contrastive and caption loss in one run.

    clip-jax train coca_l14 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan coca_l14 --topology v5e:16x16

Hardware: one v5e-256 slice; five days (compiled, not run). It takes 14.6 of 16 GB per chip; MFU is
at most 72% by the sequential bound.
Recipe: weight 1 for the contrastive loss and 2 for the caption loss (CoCa, section 4.1). The rest
is the CLIP paper's, as in `vit_l14`.
Expected: unknown; nobody has trained this config yet.
Notes: The class token's mask is the one that open_clip released, so that weights can be converted
in both directions; `--model.text.correct-class-mask True` trains with the correct mask.
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
from clip_jax.sharding import MeshConfig


def get_config() -> Config:
    return Config(
        steps=390_625,
        batch_size=32_768,
        model=dataclasses.replace(zoo.get("coca_ViT-L-14"), remat="residual"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(), CaptionConfig(weight=2.0)),
        optim=OptimConfig(learning_rate=4e-4, warmup_steps=2_000),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
