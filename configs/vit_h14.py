"""ViT-H/14, 986M parameters, at the CLIP paper's batch size.

    clip-jax train vit_h14 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan vit_h14 --topology v5p:4x4x8

Hardware: 128 v5p chips; 470 hours at an assumed 40% MFU, $253,000 at $4.20 per chip-hour.
Recipe: Cherti et al. 2023 for LAION-2B. Learning rate 5e-4, 2,000 warm-up steps; their 34.7B
samples at a batch size of 79,104 (824 A100s) are 1,060,000 steps of 32,768 here.
Expected: 78.0% ImageNet zero-shot top-1 with LAION-2B (the paper's).
Notes: Parameters and optimizer state are sharded over 8 chips.
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
        steps=1_060_000,
        batch_size=32_768,
        model=dataclasses.replace(zoo.get("ViT-H-14"), remat="hidden"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=2_000),
        mesh=MeshConfig(fsdp=8),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
