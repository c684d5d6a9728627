"""ViT-B/16 as OpenAI trained it.

    clip-jax train configs/vit_b16.py --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan configs/vit_b16.py --topology v5e:16x16

Hardware: one v5e-256 slice; 22 hours at 40% MFU, $6,700 at $1.20 a chip-hour. With
`--mesh.fsdp 16` the compiler expects 175 ms a step and not 187.
Recipe: CLIP paper, section 2.5 and tables 18 to 20: 32 epochs of 400M pairs are 390,625 steps of
32,768; AdamW with weight decay 0.2, warm-up of 2,000 steps, cosine to zero, scale capped at 100,
random square crops alone.
Expected: 68% zero-shot top-1 on ImageNet with OpenAI's data (open_clip's evaluation of the released
weights: 68.3%).
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
        model=dataclasses.replace(zoo.get("ViT-B/16"), remat="hidden"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=2_000),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
