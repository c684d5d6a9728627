r"""DataComp's small scale: ViT-B/32 on 12.8M pairs, a benchmark of data filters.

    clip-jax prepare 'datacomp/{00000000..00001279}.tar' prepared \
        --score-column clip_l14_similarity_score --min-score 0.28
    clip-jax train datacomp_small --data.source.path prepared
    clip-jax plan datacomp_small --topology v5e:2x4

Hardware: one v5e-8 slice; 15 minutes at an assumed 40% MFU, $2 at $1.20 per chip-hour. `plan`
reports 12.6 of 16 GB per chip and an MFU of at most 69%.
Recipe: DataComp (Gadre et al. 2023, arXiv:2304.14108), table of scale configurations. Batch size
4,096, learning rate 5e-4, 500 warm-up steps. The run sees as many pairs as the unfiltered pool
has, whatever the filter keeps.
Expected: 2.5% ImageNet zero-shot top-1 without a filter, 3.8% with the basic filter, 5.1% with
the 30% of best CLIP score (L/14), the best of the paper's simple filters at this scale.
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
        steps=3_125,
        batch_size=4_096,
        model=dataclasses.replace(zoo.get("ViT-B-32"), remat="hidden"),
        data=DataConfig(source=PathConfig(path="prepared"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=500),
        checkpoint=CheckpointConfig(every_steps=500),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=500),),
    )
