"""CLIPA's first phase for ViT-L/14: 36 image tokens and 8 text tokens, at a fraction of the cost.

    clip-jax train clipa_l14 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan clipa_l14 --topology v5e:16x16

Hardware: one v5e-256 slice; 13 hours at an assumed 40% MFU, $3,900 at $1.20 per chip-hour.
Recipe: CLIPA-v2 (Li et al. 2023), from the authors' script for H/14. 84 pixels, 8 text tokens,
batch size 65,536, learning rate 2.048e-3 (8e-6 · batch size / 256), β2 0.95, 782 warm-up steps,
weight decay 0.2, crops of 40% to 100%; 12.8B samples are 195,312 steps. In the paper, a short
second phase at 224 pixels and 32 tokens follows, with resized position embeddings.
Expected: 79% ImageNet zero-shot top-1 after both phases on DataComp-1B (the paper's L/14).
Notes: The mesh shards parameters and optimizer state over 16 chips, which shortens all-reduces.
On fewer devices, set `--mesh.fsdp 1`.
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
    model = zoo.get("ViT-L-14-CLIPA")
    vision = dataclasses.replace(model.vision, image_size=84)
    text = dataclasses.replace(model.text, context_length=8)
    return Config(
        steps=195_312,
        batch_size=65_536,
        model=dataclasses.replace(model, vision=vision, text=text, remat="hidden"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16, crop_scale=(0.4, 1.0)),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=2.048e-3, warmup_steps=782, b2=0.95),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
