r"""SigLIP 2 L/16 with all losses: two of them from 80% of the learning-rate schedule.

    clip-jax train siglip2_l16_full --data.source.path 'gs://BUCKET/pairs/*.tar' \
        --model.text.tokenizer.file gs://BUCKET/tokenizer.model
    clip-jax plan siglip2_l16_full --topology v5p:4x4x8

Hardware: one v5p-256 slice of 128 chips; 627 hours at an assumed 40% MFU, $337,000 at $4.20 per
chip-hour. With both losses a compiled step takes 62.5 of 95 GB per chip, and by its schedules
1.75 s (64% MFU); a host then reads 363 images/s. One v5e-256 slice has too little memory for it at
this batch size with remat `attention`.
Recipe: as `siglip2_b16_full`, with the paper's factor 0.5 on both losses.
Expected: the paper has 82.5% ImageNet zero-shot top-1 for L/16 at 256 pixels. Nobody has trained
this config, which lacks the captions of regions (LocCa).
Notes: As for `siglip2_b16_full`. The paper has no NaFlex model of this size.
"""

import dataclasses

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.models import zoo


def get_config() -> Config:
    base = load_config("siglip2_b16_full")
    model = zoo.get("ViT-L-16-SigLIP2-256")
    vision = model.vision.with_max_patches(256)
    text = dataclasses.replace(model.text, tokenizer=base.model.text.tokenizer)
    decoder = dataclasses.replace(
        base.model.decoder, width=text.width, depth=text.depth // 2, num_heads=text.num_heads
    )
    first, last = base.stages
    return dataclasses.replace(
        base,
        model=dataclasses.replace(
            base.model, embed_dim=model.embed_dim, vision=vision, text=text, decoder=decoder
        ),
        stages=(dataclasses.replace(first, weights=(1.0, 1.0, 0.5, 0.125)), last),
    )
