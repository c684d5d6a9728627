"""MaMMUT of ViT-L/14, LAION's architecture: one text tower for contrast and captions.

    clip-jax train configs/mammut_l14.py --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan configs/mammut_l14.py --topology v5e:16x16

Hardware: one v5e-256 slice takes 12.1 of 16 GB a chip, MFU at most 64% (sequential bound),
44% by the compiler estimate, four and a half days (compiled, not run).
Recipe: both losses count 1; 12.8B samples of DataComp, the largest count at which it was compared
with CLIP at equal budget; the rest is the CLIP paper's, as in `configs/vit_l14.py`.
Expected: no run of ours; 80.34% zero-shot top-1 on ImageNet where CLIP of this size has 79.2%, both
of 12.8B samples of DataComp.
"""

import dataclasses

from clip_jax.checkpoints.manager import CheckpointConfig
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
