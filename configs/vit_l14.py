"""ViT-L/14 as OpenAI trained it.

    clip-jax train vit_l14 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan vit_l14 --topology v5e:16x16

Hardware: one v5e-256 slice; 93 hours at an assumed 40% MFU, $28,500 at $1.20 per chip-hour.
Recipe: CLIP paper, section 2.5 and tables 18 to 20. AdamW with weight decay 0.2, 2,000 warm-up
steps, cosine decay to zero, logit scale capped at 100, only random square crops; 32 epochs of 400M
pairs are 390,625 steps of 32,768. The learning rate is 4e-4.
Expected: 75.5% ImageNet zero-shot top-1 with OpenAI's data (open_clip's evaluation of the released
weights).
Notes: A batch size of 65,536 takes two slices.
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
        steps=390_625,
        batch_size=32_768,
        model=dataclasses.replace(zoo.get("ViT-L/14"), remat="mlp"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=4e-4, warmup_steps=2_000),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
