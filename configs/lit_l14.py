r"""Locked-image tuning (LiT): a text tower for DINOv2's L/14 with registers, which stays as it is.

    hf download facebook/dinov2-with-registers-large --local-dir dinov2
    clip-jax convert dinov2 dinov2-224 --to hugging-face --image-size 224
    clip-jax train lit_l14 --init-from dinov2-224 --init-architecture \
        --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan lit_l14 --topology v5e:4x8

Hardware: one v5e-32 slice; 19 hours at an assumed 40% MFU, $750 at $1.20 per chip-hour.
Recipe: that of `lit_b16`, with a text tower of 12 layers and width 1,024.
Expected: not measured. LiT-L16L has 75.7% ImageNet zero-shot top-1 (big_vision's README_lit.md),
with a ViT-L/16 trained on ImageNet-21k and a text tower that starts as BERT-large.
Notes: DINOv2's weights are under Apache-2.0. The image tower's forward pass is 92% of the FLOPs.
"""

import dataclasses

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.models import zoo


def get_config() -> Config:
    config, model = load_config("lit_b16"), zoo.get("DINOv2-L-14-reg4")
    words = {"context_length": 16, "width": 1024, "depth": 12, "num_heads": 16}
    return dataclasses.replace(
        config,
        accumulation=1,
        model=dataclasses.replace(
            model,
            vision=model.vision.with_image_size(224),
            text=dataclasses.replace(model.text, **words),
        ),
    )
