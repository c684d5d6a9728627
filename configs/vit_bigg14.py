"""ViT-bigG/14, 2.54B parameters.

    clip-jax train vit_bigg14 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan vit_bigg14 --topology v5p:8x8x8

Hardware: 512 v5p chips; 13 days at an assumed 40% MFU, $692,000 at $4.20 per chip-hour.
Recipe: that of ViT-H/14 (Cherti et al. 2023) with a batch size of 65,536; 34B samples are 520,000
steps. Half the learning rate, a longer warm-up, β2 0.95 and clipping at norm 1 are our choices
against the loss spikes of large models.
Expected: 80.1% ImageNet zero-shot top-1 after 39B samples of LAION-2B (open_clip's released
weights).
Notes: Parameters and optimizer state are sharded over 16 chips.
"""

import dataclasses

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig


def get_config() -> Config:
    return Config(
        steps=520_000,
        batch_size=65_536,
        model=dataclasses.replace(zoo.get("ViT-bigG-14"), remat="hidden"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=2.5e-4, warmup_steps=10_000, b2=0.95, clip_norm=1.0),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
