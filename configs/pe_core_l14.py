"""PE core L/14 at 336 pixels: rotary positions, attention pooling.

    clip-jax train pe_core_l14 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan pe_core_l14 --topology v5e:16x16

Hardware: one v5e-256 slice (compiled, not run).
Recipe: the optimizer of `vit_l14`, that of the CLIP paper, for 12.8B samples. The paper
(arXiv:2504.13181) trains 58B samples, with LAMB and growing resolutions.
Expected: 83.5% ImageNet zero-shot top-1 after the paper's recipe and data (Meta's evaluation of the
released weights). Nobody has trained this config yet.
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
        model=dataclasses.replace(zoo.get("PE-Core-L-14-336"), remat="outputs"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=4e-4, warmup_steps=2_000),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
