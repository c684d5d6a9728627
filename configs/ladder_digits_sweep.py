"""The best learning rate of four widths, a factor of 8 apart: a sweep for two CPU cores.

    clip-jax scale ladder ladder_digits_sweep --jobs 2
    clip-jax scale collect runs/ladder_digits_sweep --output sweep.csv
    clip-jax scale choose sweep.csv --choose-by info_nce --report zero_shot/unseen/top1

Hardware: two CPU cores, about 20 minutes.
Notes: The data are the four-digit numbers of `ladder_digits`. A rule for learning rates across
widths is fitted to the optima of the three smaller widths and must predict that of the largest.
Learning rates are a factor of 2 apart, centred on the rule that the spec assumes.
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
from clip_jax.scaling.ladder import HardwareConfig, LadderConfig, RulesConfig, SweepConfig

WIDTHS = (16, 32, 64, 128)
AT_THE_END = 1_000_000  # steps between evaluations; the last step is always evaluated


def model(width: int) -> CLIPConfig:
    heads = width // 8
    return CLIPConfig(
        embed_dim=64,
        vision=ViTConfig(image_size=32, patch_size=8, width=width, depth=2, num_heads=heads),
        text=TextConfig(vocab_size=2_048, context_length=26, width=width, depth=1, num_heads=heads),
        dtype="float32",
    )


def get_ladder() -> LadderConfig:
    numbers = DigitsConfig(digits=4, jitter=HELD_OUT_JITTER)
    pool = DigitsConfig(digits=4, split="test", samples=10_000)
    return LadderConfig(
        base=Config(
            batch_size=64,
            data=DataConfig(source=numbers, threads=1),
            optim=OptimConfig(learning_rate=2e-3, warmup_steps=40, weight_decay=0.1),
            checkpoint=CheckpointConfig(every_steps=AT_THE_END, keep=1),
            evals=(
                PairsEvalConfig(
                    data=DataConfig(source=pool, crop="center"),
                    pairs=2_048,
                    every_steps=AT_THE_END,
                ),
                DigitsEvalConfig(
                    source=numbers,
                    per_number=1,
                    max_numbers=500,
                    max_prompts=1,
                    every_steps=AT_THE_END,
                ),
            ),
        ),
        models={f"w{width}": model(width) for width in WIDTHS},
        samples=(24_576,),
        seeds=(0, 1, 2),
        rules=RulesConfig(reference_width=32, width_exponent=-0.5),
        sweep=SweepConfig(learning_rates=(0.25, 0.5, 1.0, 2.0, 4.0)),
        hardware=(HardwareConfig(chip="CPU core", peak_flops=50e9, mfu=0.3, start_seconds=15),),
    )
