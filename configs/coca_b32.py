"""CoCa of ViT-B/32, open_clip's architecture: contrast and captions in one run.

    clip-jax train configs/coca_b32.py --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan configs/coca_b32.py --topology v5e:16x16

Hardware: one v5e-256 slice, batch split by data alone: 6.6 of 16 GB a chip, MFU at most 33%
by the sequential bound, about a day (compiled, not run). Of a pair's FLOPs the decoder takes 55%.
Recipe: the contrastive loss counts 1 and the caption's 2 (CoCa, section 4.1); the rest is the
CLIP paper's, as in `configs/vit_b32.py`. The class token's mask is the one that
open_clip released, so that the weights go there and back; the right one is trained with
--model.text.correct-class-mask True.
Expected: nothing yet; there is no run of ours.
"""

import dataclasses

from clip_jax.checkpoints.manager import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import CaptionConfig, SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        steps=390_625,
        batch_size=32_768,
        model=dataclasses.replace(zoo.get("coca_ViT-B-32"), remat="attention"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SoftmaxConfig(), CaptionConfig(weight=2.0)),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=2_000),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
