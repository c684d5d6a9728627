r"""SigLIP 2 NaFlex B/16: images at their own aspect ratio, in sequences of 128 to 1,024 patches.

    clip-jax train siglip2_b16_naflex --data.source.path 'gs://BUCKET/pairs/*.tar' \
        --model.text.tokenizer.file gs://BUCKET/tokenizer.model
    clip-jax plan siglip2_b16_naflex --topology v5e:16x16

Hardware: one v5e-256 slice; its FLOPs take 149 hours at an assumed 40% MFU. No plan was compiled.
Recipe: Tschannen et al. 2025 (SigLIP 2), section 2.4.2, and for everything else `siglip2_b16`. The
first 90% of the learning-rate schedule have square images of 256 pixels. In its last 10%, stretched
to 3.75 times as many steps, each batch has images at their own aspect ratio and a length drawn from
128, 256, 576, 784 and 1,024 patches; the longest has half the batch and twice the steps. 40B
samples are 1,220,703 steps of the schedule, so the run has 1.275 times as many, and 48.5B samples.
Expected: below the paper's 78.5% ImageNet zero-shot top-1 at 256 patches, which it reaches with all
its losses; this config has the sigmoid loss only.
Notes: Parameters and optimizer state are sharded over 16 chips. Batches of 784 patches take the
most memory: estimated from the compiled steps in BENCHMARKS.md, 23 GB per chip if activations are
recomputed as in `siglip2_b16`, and 13 of 16 GB with `remat="attention"`.
"""

import dataclasses

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.batch_plan import SigLIP2Lengths
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import SigmoidConfig
from clip_jax.models import zoo
from clip_jax.models.text import TokenizerConfig
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig


def get_config() -> Config:
    model = zoo.get("ViT-B-16-SigLIP2-naflex")
    # Gemma's vocabulary, which Google licenses, with SigLIP 2's rules; or your own vocabulary of up
    # to 256,000 tokens.
    words = TokenizerConfig(file="tokenizer.model", clean="lower", end_id=1)
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, tokenizer=words))
    return Config(
        steps=1_556_397,  # 1,220,703 of the schedule × (0.9 + 3.75 × 0.1)
        batch_size=32_768,
        lengths=SigLIP2Lengths(),
        model=dataclasses.replace(model, remat="attention"),
        data=DataConfig(source=TarConfig(path="pairs/*.tar"), threads=16),
        objective=(SigmoidConfig(),),
        optim=OptimConfig(
            learning_rate=1e-3, warmup_steps=20_000, weight_decay=0.1, b2=0.95, clip_norm=1.0
        ),
        mesh=MeshConfig(fsdp=16),
        checkpoint=CheckpointConfig(every_steps=1_000),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=10_000),),
    )
