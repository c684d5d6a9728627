r"""ViT-S/16 on a reinforced data set: stored teachers, augmentations and synthetic captions.

    clip-jax prepare 'gs://BUCKET/pairs/*.tar' gs://BUCKET/captioned \
        --captions CAPTIONER --captions-per-image 5
    clip-jax prepare gs://BUCKET/captioned gs://BUCKET/reinforced \
        --reinforce TEACHER_1 TEACHER_2 --augmentations-per-image 30
    clip-jax train vit_s16_reinforced --data.source.path gs://BUCKET/reinforced
    clip-jax plan vit_s16_reinforced --topology v5e:4x4

Hardware: one v5e-16 slice; its FLOPs take 2.6 hours at an assumed 40% MFU, without the work of
`prepare`. No plan was compiled.
Recipe: MobileCLIP (Vasu et al. 2023, arXiv:2311.17049), its released training script for 12.8M
pairs with 30 augmentations and five synthetic captions each, and two ViT-L/14 as teachers. The loss
is distillation alone, with true and with synthetic captions. Batch 8,192 for 30,000 steps (246M
pairs), learning rate 1e-3, AdamW with β₂ 0.95, teachers' scale 100.
Expected: below 61.7% ImageNet zero-shot top-1, which ViT-B/16 reached by this recipe on
DataCompDR-12M (paper). Nobody has trained this config yet.
Notes: `prepare` prints the `StoredTeacher` lines of your own teachers. Embeddings of 12.8M pairs
take 1.4 TB in float16. With two augmentations they take 0.3 TB.
"""

import dataclasses

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.any import PathConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import DistillationConfig, StoredTeacher
from clip_jax.models import zoo
from clip_jax.optim import OptimConfig


def get_config() -> Config:
    teachers = (
        StoredTeacher(embed_dim=768, logit_scale=100.0),
        StoredTeacher(embed_dim=768, logit_scale=100.0),
    )
    return Config(
        steps=30_000,
        batch_size=8_192,
        model=dataclasses.replace(zoo.get("ViT-S-16"), remat="attention"),
        data=DataConfig(source=PathConfig(path="reinforced"), crop="stored", threads=16),
        objective=(DistillationConfig(teachers=teachers, captions="both"),),
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1_000, b2=0.95, clip_norm=1.0),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=5_000),),
    )
