r"""CapPa B/16: an image tower that learns from captions alone, most of them predicted in parallel.

    clip-jax train cappa_b16 --data.source.path 'gs://BUCKET/pairs/*.tar' \
        --model.text.tokenizer.file gs://BUCKET/tokenizer.model
    clip-jax plan cappa_b16 --topology v5e:16x16

Hardware: one v5e-256 slice; 5.9 hours at an assumed 40% MFU, $1,800 at $1.20 per chip-hour. The
compiled step takes 4.1 of 16 GB per chip, and by the compiler's schedules 49 ms, 47% MFU.
Recipe: Tschannen et al. 2023 (CapPa, arXiv:2306.07915) and big_vision's config of it: ViT-B/16 at
224 pixels, a decoder of 6 layers without biases, 64 text tokens, 0.75 of the captions predicted in
parallel, batch size 8,192, 366,500 steps (3B samples). Adafactor with β2 of at most 0.999 and a
bfloat16 momentum, learning rate 1e-3 after 10,000 steps of warm-up, then a cosine; weight decay
1e-4 (0.1 of the learning rate); gradients clipped at norm 1.
Expected: unknown; nobody has trained this config yet.
Notes: Its vocabulary is any of up to 32,000 tokens; the paper's is C4's. The paper does not say how
the image is pooled for classification by few examples; here, by the mean of all patches. The text
tower is not trained and not computed.
"""

import dataclasses

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import CaptionConfig
from clip_jax.models import zoo
from clip_jax.models.cappa import CapPaConfig
from clip_jax.models.text import TokenizerConfig
from clip_jax.optim import OptimConfig
from clip_jax.optim.adafactor import Adafactor


def get_config() -> Config:
    model = zoo.get("ViT-B-16-SigLIP")
    # A sentencepiece vocabulary of up to 32,000 tokens, whose end of text is also the padding.
    words = TokenizerConfig(file="tokenizer.model", clean="none", end_id=1, pad_id=1)
    return Config(
        steps=366_500,
        batch_size=8_192,
        model=dataclasses.replace(
            model,
            vision=dataclasses.replace(model.vision, pool="mean"),
            text=dataclasses.replace(model.text, tokenizer=words),
            decoder=CapPaConfig(),
            init_logit_bias=None,
            remat="hidden",
        ),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(CaptionConfig(weight=1.0),),
        optim=OptimConfig(
            optimizer=Adafactor(),
            learning_rate=1e-3,
            warmup_steps=10_000,
            weight_decay=0.1,
            b2=0.999,
            first_moment="bfloat16",
            clip_norm=1.0,
        ),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(
            SuiteEvalConfig(
                dataset=("imagenet1k",), tasks=("few-shot",), missing="skip", every_steps=10_000
            ),
        ),
    )
