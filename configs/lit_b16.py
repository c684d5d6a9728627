r"""Locked-image tuning (LiT): a text tower for DINOv3's B/16, which stays as it is.

    hf download facebook/dinov3-vitb16-pretrain-lvd1689m --local-dir dinov3
    clip-jax train lit_b16 --init-from dinov3 --init-architecture \
        --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan lit_b16 --topology v5e:2x4

Hardware: one v5e-8 host; 19 hours at an assumed 40% MFU, $180 at $1.20 per chip-hour.
Recipe: Zhai et al. 2022 (LiT, arXiv:2111.07991). The 60,000 steps are those of the released
LiT-B16B_2; of big_vision's lit_coco.py are the learning rate 1e-3 with cosine decay after 3% of
warm-up, gradients clipped at norm 1, and texts of 16 tokens. The batch size, the weight decay and
AdamW are our choice.
Expected: not measured. LiT-B16B_2 has 73.9% ImageNet zero-shot top-1 (big_vision's README_lit.md),
with a ViT-B/16 trained on ImageNet-21k, a text tower that starts as BERT-base, and the pairs of
CC12M and YFCC100M.
Notes: The licence of DINOv3's weights holds for the trained model, too. `--init-architecture` takes
the tower's architecture and preprocessing from any folder; the plan is that of DINOv3's. The image
tower's forward pass is 81% of the FLOPs. Of a batch's two chunks, only texts are encoded twice.
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
    model = zoo.get("DINOv3-B-16")
    text = dataclasses.replace(model.text, context_length=16)
    return Config(
        steps=60_000,
        batch_size=16_384,
        accumulation=2,
        model=dataclasses.replace(model, text=text),
        init_towers=("image",),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=32),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(
            learning_rate=1e-3,
            warmup_steps=1_800,
            weight_decay=0.1,
            clip_norm=1.0,
            locked=("image",),
        ),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=5_000),),
    )
