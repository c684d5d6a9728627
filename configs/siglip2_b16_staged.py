r"""SigLIP 2 B/16 with its sigmoid loss, its caption decoder, and NaFlex images in the last tenth.

    clip-jax train siglip2_b16_staged --data.source.path 'gs://BUCKET/pairs/*.tar' \
        --model.text.tokenizer.file gs://BUCKET/tokenizer.model
    clip-jax plan siglip2_b16_staged --topology v5e:16x16

Hardware: one v5e-256 slice; 223 hours at an assumed 40% MFU, $68,600 at $1.20 per chip-hour.
By the schedules of its compiled steps, one takes 0.31 s at the fixed resolution, and 0.24 to 0.79 s
with 128 to 784 patches (53 to 58% MFU). 784 patches take the most memory, 15.0 of 16 GB per chip.
Recipe: Tschannen et al. 2025 (SigLIP 2), sections 2.1, 2.2 and 2.4.2, and for everything else
`siglip2_b16_naflex`. The decoder is CapPa's with half as many layers as the text tower; half of the
captions are predicted in parallel; both losses have weight 1.
Expected: below the paper's 78.5% ImageNet zero-shot top-1 at 256 patches: self-distillation and
masked prediction, in the paper from 80% of the steps on, are missing, and so are the captions of
regions (LocCa).
Notes: The paper does not give the decoder's width, heads and initialisation; they are the text
tower's and CapPa's. Its vocabulary is the text tower's. In NaFlex batches the decoder attends to
valid patches alone.
"""

import dataclasses

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.losses import CaptionConfig
from clip_jax.models.cappa import CapPaConfig


def get_config() -> Config:
    base = load_config("siglip2_b16_naflex")
    text = base.model.text
    decoder = CapPaConfig(
        width=text.width, depth=text.depth // 2, num_heads=text.num_heads, parallel=0.5
    )
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, decoder=decoder),
        objective=(*base.objective, CaptionConfig(weight=1.0)),
    )
