"""RN50x64, the paper's largest ResNet: 448 pixels, 623M parameters.

    clip-jax train configs/rn50x64.py --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan configs/rn50x64.py --topology v5p:4x4x8

Hardware: 128 v5p chips (OpenAI: 18 days on 592 V100s); 10 days at 40% MFU, $133,000 at $4.20 a
chip-hour.
Recipe: CLIP paper, section 2.5 and tables 18 to 20: 32 epochs of 400M pairs are 390,625 steps of
32,768; AdamW with weight decay 0.2, warm-up of 2,000 steps, cosine to zero, scale capped at 100,
random square crops alone. For ResNets β2 is 0.999 and ε 1e-8; the rate is 3.6e-4. BatchNorm's
statistics are those of 128 samples at a time, half of a device's share there, so that they depend
on no mesh.
Expected: 73.9% zero-shot top-1 on ImageNet with OpenAI's data (open_clip's evaluation of the
released weights).
"""

import dataclasses

from clip_jax.checkpoints.manager import CheckpointConfig
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
            zoo.get("RN50x64"),
            vision=dataclasses.replace(zoo.get("RN50x64").vision, batch_norm_group=128),
            remat="full",
        ),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=3.6e-4, warmup_steps=2_000, b2=0.999, eps=1e-8),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
