"""OpenAI's RN50 on Conceptual 12M, the smallest public data set that gives a useful CLIP.

    clip-jax prepare 'cc12m/{00000..01242}.tar' prepared --resize 256
    clip-jax train cc12m --data.source.path prepared
    clip-jax plan cc12m --topology v5e:2x4

Hardware: one v5e-8 slice; 7 hours at an assumed 40% MFU, $67 at $1.20 per chip-hour.
Recipe: the command in open_clip's documentation for Conceptual Captions. Batch size 1,024, learning
rate 1e-3, weight decay 0.1, 10,000 warm-up steps, 30 epochs of the 10M pairs that can still be
downloaded.
Expected: up to 36.45% ImageNet zero-shot top-1, of open_clip's RN50 trained on CC12M, whose recipe
is not published.
"""

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
        steps=292_968,
        batch_size=1_024,
        model=zoo.get("RN50"),
        data=DataConfig(source=PathConfig(path="prepared"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(
            learning_rate=1e-3, warmup_steps=10_000, weight_decay=0.1, b2=0.999, eps=1e-8
        ),
        checkpoint=CheckpointConfig(every_steps=2_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
