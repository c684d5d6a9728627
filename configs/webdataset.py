"""Image-text pairs in WebDataset tars, as img2dataset writes them.

    clip-jax train webdataset --data.source.path 'pairs/{00000..00041}.tar'

Hardware: a pod, as for `vit_b32`: the model is ViT-B/32 with GELU, the batch size 32,768.
Notes: The first start indexes the shards (100,000 samples/s per core, where the disk allows) and
stores the index beside them. Gzipped tars are an error, since they have no random access. The type
of a config's source chooses the format: PathConfig in place of TarConfig reads any format, the
other types in clip_jax/data/sources/ have more options, and MixtureConfig joins several sources by
weight.
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
        steps=390_000,
        batch_size=32_768,
        model=dataclasses.replace(zoo.get("ViT-B-32"), remat="hidden"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=2_000),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=5_000),),
    )
