"""ViT-B/16 distilled from a ViT-L/14 that encodes each batch beside it (MobileCLIP 2's recipe).

    clip-jax train vit_b16_distilled --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan vit_b16_distilled --topology v5e:16x16

Hardware: one v5e-256 slice; 54 hours at an assumed 40% MFU, $16,600 at $1.20 per chip-hour. The
teacher's forward passes are 59% of the FLOPs. `plan` reports 13.1 of 16 GB per chip, and an MFU of
at most 87% by the sequential bound.
Recipe: MobileCLIP 2 (Faghri et al. 2025, arXiv:2508.20691), its released training script. The loss
is distillation alone, batch 65,536 for 200,000 steps (13.1B pairs), learning rate 1e-3, AdamW with
β₂ 0.95, crops of 8 to 100% of the area, two operations of RandAugment, teacher's scale 70.
Expected: below 79.4% ImageNet zero-shot top-1, which MobileCLIP2-B reached in as many pairs with
two teachers, synthetic captions and Apple's DFNDR-2B data. Nobody has trained this config yet.
Notes: The teacher is the result of `vit_l14`, or any other model: `LiveTeacher(weights=...)`. With
stored embeddings (`clip-jax prepare --reinforce`), a step has 41% of the FLOPs.
"""

import dataclasses

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.augment import AugmentConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import DistillationConfig, LiveTeacher
from clip_jax.models import zoo
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig


def get_config() -> Config:
    teacher = LiveTeacher(weights="runs/vit_l14", model=zoo.get("ViT-L/14"), logit_scale=70.0)
    return Config(
        steps=200_000,
        batch_size=65_536,
        model=dataclasses.replace(zoo.get("ViT-B/16"), remat="hidden"),
        data=DataConfig(
            source=TarConfig(path="pairs/*.tar"),
            crop_scale=(0.08, 1.0),
            augment=AugmentConfig(operations=2),
            threads=16,
        ),
        objective=(DistillationConfig(teachers=(teacher,)),),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1_000, b2=0.95, clip_norm=1.0),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
