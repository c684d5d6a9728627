"""ViT-L/14@336px: one more epoch of vit_l14 at a higher resolution (FixRes).

    clip-jax train configs/vit_l14_336.py --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan configs/vit_l14_336.py --topology v5e:16x16

Hardware: one v5e-256 slice; 7 hours at 40% MFU, $2,000 at $1.20 a chip-hour.
Recipe: CLIP paper, section 2.5 and table 20: one epoch of 400M pairs, 12,207 steps, at 336 pixels
and a rate of 2e-5. The weights it starts from are those of vit_l14, with the positions resized;
from scratch it is of little use. The warm-up of 500 steps is ours.
Expected: one point above ViT-L/14 on ImageNet (76.6% for the released weights).
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
from clip_jax.sharding import MeshConfig


def get_config() -> Config:
    return Config(
        steps=12_207,
        batch_size=32_768,
        model=dataclasses.replace(zoo.get("ViT-L/14@336px"), remat="full"),
        init_from="runs/vit_l14",
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=2e-5, warmup_steps=500),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=2_000),),
    )
