r"""A scaling ladder for two CPU cores: four-digit numbers, 3 widths × 4 sample counts × 3 seeds.

    clip-jax scale ladder ladder_digits --jobs 2
    clip-jax scale collect runs/ladder_digits --output ladder_digits.csv
    clip-jax scale fit ladder_digits.csv --metric info_nce --metric-is error --form additive \
      --hold-out 'samples_seen>=98304'

Hardware: two CPU cores, 20 to 30 minutes (`--dry-run` estimates 0.94 core hours).
Notes: The error is the contrastive loss among 1,024 held-out pairs (`info_nce`), which starts at
log 1,024 = 6.93. With 10,000 numbers, a batch rarely holds two pairs of the same number.
The handwriting varies as mildly as in the test set. With the stronger jitter of `digits`, width 32
learns nothing in its first 25,000 pairs (loss 6.0 after 50,000 pairs instead of 4.0), and such a
plateau follows no law. At width 32, a learning rate of 2e-3 learns later than 1e-3 (4.5 after
50,000 pairs). The analysis was fixed before the largest count was looked at: L(N, D) on `info_nce`,
fitted to the three smaller counts, must predict each run of the largest.
"""

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.digits import HELD_OUT_JITTER, DigitsConfig
from clip_jax.data.pipeline import DataConfig
from clip_jax.evals.digits import DigitsEvalConfig
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig
from clip_jax.scaling.ladder import HardwareConfig, LadderConfig, RulesConfig

WIDTHS = (24, 40, 64)
AT_THE_END = 1_000_000  # steps between evaluations; the last step is always evaluated


def model(width: int) -> CLIPConfig:
    heads = width // 8
    return CLIPConfig(
        embed_dim=64,
        vision=ViTConfig(image_size=32, patch_size=8, width=width, depth=3, num_heads=heads),
        text=TextConfig(vocab_size=2_048, context_length=26, width=width, depth=2, num_heads=heads),
        dtype="float32",
    )


def get_ladder() -> LadderConfig:
    numbers = DigitsConfig(digits=4, jitter=HELD_OUT_JITTER)
    # An epoch of the pool has each of the 10,000 numbers once: no two of its pairs are the same.
    pool = DigitsConfig(digits=4, split="test", samples=10_000)
    return LadderConfig(
        base=Config(
            batch_size=64,
            data=DataConfig(source=numbers, threads=1),
            optim=OptimConfig(learning_rate=1e-3, warmup_steps=100, weight_decay=0.1),
            checkpoint=CheckpointConfig(every_steps=500, keep=1),
            evals=(
                PairsEvalConfig(
                    data=DataConfig(source=pool, crop="center"),
                    pairs=4_096,
                    every_steps=AT_THE_END,
                ),
                DigitsEvalConfig(
                    source=numbers,
                    per_number=1,
                    max_numbers=2_000,  # all unseen numbers
                    max_prompts=1,  # for each of 10,000 classes
                    every_steps=AT_THE_END,
                ),
            ),
        ),
        models={f"w{width}": model(width) for width in WIDTHS},
        samples=(12_288, 24_576, 49_152, 98_304),
        seeds=(0, 1, 2),
        rules=RulesConfig(reference_width=32, width_exponent=-0.5),
        hardware=(HardwareConfig(chip="CPU core", peak_flops=50e9, mfu=0.3, start_seconds=40),),
    )
