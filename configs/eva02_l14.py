"""EVA-02 L/14: rotary positions, SwiGLU, norms inside of both branches.

    clip-jax train eva02_l14 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan eva02_l14 --topology v5e:16x16

Hardware: one v5e-256 slice (compiled, not run).
Recipe: the optimizer of `vit_l14`, that of the CLIP paper, for 12.8B samples. EVA-CLIP
(arXiv:2303.15389) starts from EVA-02's image tower and CLIP's text tower: `--init-from` does that
here, with such weights.
Expected: 79.8% ImageNet zero-shot top-1 with EVA-CLIP's recipe and data (its paper, table 1).
Nobody has trained this config yet.
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
        model=dataclasses.replace(zoo.get("EVA02-L-14"), remat="attention"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=4e-4, warmup_steps=2_000),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
