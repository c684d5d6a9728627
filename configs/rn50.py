"""ResNet-50 as OpenAI trained it: three-convolution stem, anti-aliased strides, attention pool.

    clip-jax train rn50 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan rn50 --topology v5e:16x16

Hardware: one v5e-256 slice; 9 hours at an assumed 40% MFU, $2,900 at $1.20 per chip-hour.
Recipe: CLIP paper, section 2.5 and tables 18 to 20. AdamW with weight decay 0.2, 2,000 warm-up
steps, cosine decay to zero, logit scale capped at 100, only random square crops; 32 epochs of 400M
pairs are 390,625 steps of 32,768. For ResNets, β2 is 0.999 and ε 1e-8.
Expected: 59.8% ImageNet zero-shot top-1 with OpenAI's data (open_clip's evaluation of the released
weights).
Notes: BatchNorm's statistics are those of groups of 128 samples, a device's share on that slice
(OpenAI's were local, too), so that they do not depend on the mesh.
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


def get_config() -> Config:
    return Config(
        steps=390_625,
        batch_size=32_768,
        model=dataclasses.replace(
            zoo.get("RN50"),
            vision=dataclasses.replace(zoo.get("RN50").vision, batch_norm_group=128),
            remat="hidden",
        ),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=2_000, b2=0.999, eps=1e-8),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
