r"""DataComp's medium scale: ViT-B/32 on 128M pairs, a benchmark of data filters.

    clip-jax prepare 'datacomp/{00000000..00012799}.tar' prepared \
        --score-column clip_l14_similarity_score --min-score 0.28
    clip-jax train datacomp_medium --data.source.path prepared
    clip-jax plan datacomp_medium --topology v5e:2x4

Hardware: one v5e-8 slice; 2.5 hours at an assumed 40% MFU, $24 at $1.20 per chip-hour. `plan`
reports 12.6 of 16 GB per chip and an MFU of at most 69%.
Recipe: DataComp (Gadre et al. 2023, arXiv:2304.14108), table of scale configurations. Batch size
4,096, learning rate 5e-4, 500 warm-up steps. The run sees as many pairs as the unfiltered pool
has, whatever the filter keeps.
Expected: 17.6% ImageNet zero-shot top-1 without a filter, 22.6% with the basic filter, 27.3% with
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
        steps=31_250,
        batch_size=4_096,
        model=dataclasses.replace(zoo.get("ViT-B-32"), remat="hidden"),
        data=DataConfig(source=PathConfig(path="prepared"), threads=16),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=500),
        checkpoint=CheckpointConfig(every_steps=2_500),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=2_500),),
    )
