"""ViT-L/14@336px: one more epoch of `vit_l14` at a higher resolution (FixRes).

    clip-jax train vit_l14_336 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan vit_l14_336 --topology v5e:16x16

Hardware: one v5e-256 slice; 7 hours at an assumed 40% MFU, $2,000 at $1.20 per chip-hour.
Recipe: CLIP paper, section 2.5 and table 20. One epoch of 400M pairs (12,207 steps) at 336 pixels
with a learning rate of 2e-5. The 500 warm-up steps are ours.
Expected: 76.6% ImageNet zero-shot top-1 (open_clip's evaluation of the released weights), one point
above ViT-L/14.
Notes: The run starts from the weights of `vit_l14`, with resized position embeddings; from scratch
it is of little use.
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
        steps=12_207,
        batch_size=32_768,
        model=dataclasses.replace(zoo.get("ViT-L/14@336px"), remat="outputs"),
        init_from="runs/vit_l14",
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=2e-5, warmup_steps=500),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=2_000),),
    )
