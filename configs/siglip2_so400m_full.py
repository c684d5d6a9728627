r"""SigLIP 2 So400m/16 with all losses: two of them from 80% of the learning-rate schedule.

    clip-jax train siglip2_so400m_full --data.source.path 'gs://BUCKET/pairs/*.tar' \
        --model.text.tokenizer.file gs://BUCKET/tokenizer.model
    clip-jax plan siglip2_so400m_full --topology v5p:4x4x8

Hardware: one v5p-256 slice of 128 chips; 837 hours at an assumed 40% MFU, $450,000 at $4.20 per
chip-hour. With both losses a compiled step takes 81.7 of 95 GB per chip, and by its schedules
2.52 s (60% MFU); a host then reads 271 images/s. One v5e-256 slice has too little memory for it at
this batch size with remat `attention`.
Recipe: as `siglip2_b16_full`, with the paper's factor 1 on both losses.
Expected: the paper has 83.5% ImageNet zero-shot top-1 for its NaFlex model at 256 patches. Nobody
has trained this config, which lacks the captions of regions (LocCa).
Notes: As for `siglip2_b16_full`.
"""

import dataclasses

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.models import zoo


def get_config() -> Config:
    base = load_config("siglip2_b16_full")
    model = zoo.get("ViT-SO400M-16-SigLIP2-naflex")
    text = dataclasses.replace(model.text, tokenizer=base.model.text.tokenizer)
    decoder = dataclasses.replace(
        base.model.decoder, width=text.width, depth=text.depth // 2, num_heads=text.num_heads
    )
    first, last = base.stages
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, embed_dim=model.embed_dim, vision=model.vision, text=text, decoder=decoder
        ),
        stages=(dataclasses.replace(first, weights=(1.0, 1.0, 1.0, 0.25)), last),
    )
