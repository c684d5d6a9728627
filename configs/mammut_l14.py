"""MaMMUT with ViT-L/14, LAION's architecture: one text tower for contrastive and caption loss.

    clip-jax train mammut_l14 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan mammut_l14 --topology v5e:16x16

Hardware: one v5e-256 slice; four and a half days (compiled, not run). It takes 12.1 of 16 GB per
chip; MFU is at most 74% by the sequential bound.
Recipe: weight 1 for both losses; 12.8B samples of DataComp, the largest count at which LAION
(arXiv:2506.04598) compared it with CLIP at equal budget. The rest is the CLIP paper's, as in
`vit_l14`.
Expected: 80.34% ImageNet zero-shot top-1 (LAION's model), against 79.2% for CLIP of this size, both
after 12.8B samples of DataComp. Nobody has trained this config yet.
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
        model=dataclasses.replace(zoo.get("mammut_ViT-L-14"), remat="attention"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(), CaptionConfig(weight=1.0)),
        optim=OptimConfig(learning_rate=4e-4, warmup_steps=2_000),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
