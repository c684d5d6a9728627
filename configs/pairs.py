"""Your own image-text pairs: a table of image paths and captions, tars, Parquet, or a folder.

    clip-jax train pairs --data.source.path pairs.csv

Hardware: one TPU chip with 16 GB, or a GPU with 24 GB, of which JAX takes three quarters.
Expected: the loss falls clearly below log(batch size) = 6.2 within the first thousand steps if the
captions describe the images.
Notes: The model is ViT-S/16 (62M parameters). With more than a few million pairs, use ViT-B/32 and
the largest batch size that fits.
"""

import dataclasses

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.any import PathConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        steps=20_000,
        batch_size=512,
        model=dataclasses.replace(zoo.get("ViT-S-16"), remat="hidden"),
        data=DataConfig(source=PathConfig(path="pairs.csv"), threads=8),
        objective=(SoftmaxConfig(mask_same_caption=True),),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=1_000, clip_norm=1.0),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=2_000),),
    )
