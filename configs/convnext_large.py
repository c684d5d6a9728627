"""ConvNeXt-Large as image tower, at 224 pixels.

    clip-jax train convnext_large --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan convnext_large --topology v5e:16x16

Hardware: one v5e-256 slice (compiled, not run).
Recipe: the optimizer of `vit_l14`, that of the CLIP paper, for 12.8B samples. LAION's models of
this tower (`convnext_large_d`) are trained at 256 and 320 pixels, with stochastic depth and random
erasing.
Expected: 75.9% ImageNet zero-shot top-1 of LAION's `convnext_large_d` at 256 pixels. Nobody has
trained this config yet.
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
        model=dataclasses.replace(zoo.get("convnext_large"), remat="hidden"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=4e-4, warmup_steps=2_000),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
