r"""SigLIP 2 B/16 with all losses: self-distillation and masked prediction from 80% of the schedule.

    clip-jax train siglip2_b16_full --data.source.path 'gs://BUCKET/pairs/*.tar' \
        --model.text.tokenizer.file gs://BUCKET/tokenizer.model
    clip-jax plan siglip2_b16_full --topology v5e:16x16

Hardware: one v5e-256 slice; 243 hours at an assumed 40% MFU, $74,600 at $1.20 per chip-hour. With
both losses a compiled step takes 14.5 of 16 GB per chip, and by its schedules 0.73 s (57% MFU). A
host then reads 490 images/s, 34 MB/s, and makes nine views of each.
Recipe: Tschannen et al. 2025 (SigLIP 2), section 2.3, and for everything else `siglip2_b16_staged`.
From 80% of the learning-rate schedule to the NaFlex images at 90%, eight crops of each image follow
a moving average of the tower that sees all of it, and half of the patches are predicted, with the
paper's weights 1 and 0.25 times its factor 0.25 for B.
Expected: the paper has 78.5% ImageNet zero-shot top-1 at 256 patches; the captions of regions
(LocCa) are missing here. Nobody has trained this config.
Notes: The paper gives no heads, temperatures, decay of the average, augmentations nor sizes of the
crops. These are DINOv3's heads and temperatures, which change during the first 20,000 steps of the
stage; SILC's crops of 96 pixels and 5 to 40% of the area; DINO's decay, and its probabilities of
mirroring, of colours and of grayscale, without blur and solarisation. If captions say left or
right, set `flip` to 0 in both losses.
"""

import dataclasses
from typing import Any

from clip_jax.config import Config, StageConfig
from clip_jax.config_files import load_config
from clip_jax.losses import MaskedPredictionConfig, SelfDistillationConfig


def get_config() -> Config:
    base = load_config("siglip2_b16_staged")
    teacher: dict[str, Any] = {"teacher_temperature": (0.04, 0.07), "warmup": 20_000}
    return dataclasses.replace(
        base,
        objective=(
            *base.objective,
            SelfDistillationConfig(weight=0.0, **teacher),
            MaskedPredictionConfig(weight=0.0, **teacher),
        ),
        stages=(
            StageConfig(begin=0.8, weights=(1.0, 1.0, 0.25, 0.0625)),
            StageConfig(begin=0.9, weights=(1.0, 1.0, 0.0, 0.0)),
        ),
    )
