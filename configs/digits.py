"""Two-digit numbers in real handwriting, from an empty machine to zero-shot accuracy.

clip-jax train configs/digits.py

"""

from clip_jax.checkpoint import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.digits import DigitsConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.losses import SoftmaxConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig


def get_config() -> Config:
    digits = DigitsConfig(digits=2)
    return Config(
        steps=1_000,
        batch_size=256,
        model=CLIPConfig(
            embed_dim=64,
            vision=ViTConfig(image_size=16, patch_size=4, width=96, depth=4, num_heads=4),
            text=TextConfig(vocab_size=2_048, context_length=24, width=64, depth=2, num_heads=2),
            dtype="float32",
        ),
        data=DataConfig(source=digits, threads=1),
        loss=SoftmaxConfig(mask_same_caption=True),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1),
        checkpoint=CheckpointConfig(every_steps=500),
        evals=(DigitsEvalConfig(source=digits, every_steps=250),),
        report_every=50,
    )
