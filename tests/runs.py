"""A run of the digits that takes seconds, as flags and as a Config."""

import dataclasses
from pathlib import Path

from clip_jax.checkpoint import CheckpointConfig
from clip_jax.config import Config, load_config
from clip_jax.optim import OptimConfig

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "configs/digits.py"

FLAGS = [
    "--steps", "24", "--batch-size", "16", "--report-every", "1",
    "--model.embed-dim", "16",
    "--model.vision.width", "16", "--model.vision.depth", "1", "--model.vision.num-heads", "2",
    "--model.text.width", "16", "--model.text.depth", "1", "--model.text.vocab-size", "600",
    "--optim.warmup-steps", "2", "--checkpoint.every-steps", "3",
    "--evals.0.per-number", "1", "--evals.0.every-steps", "12",
]  # fmt: skip


def tiny_digits(**changes) -> Config:
    """The same run as a Config."""
    config = load_config(DIGITS)
    model = dataclasses.replace(
        config.model,
        embed_dim=16,
        vision=dataclasses.replace(config.model.vision, width=16, depth=1, num_heads=2),
        text=dataclasses.replace(config.model.text, width=16, depth=1, vocab_size=600),
    )
    defaults = {
        "steps": 24,
        "batch_size": 16,
        "report_every": 1,
        "model": model,
        "optim": OptimConfig(learning_rate=2e-3, warmup_steps=2, weight_decay=0.1),
        "checkpoint": CheckpointConfig(every_steps=3),
        "evals": (dataclasses.replace(config.evals[0], per_number=1, every_steps=12),),
    }
    return dataclasses.replace(config, **(defaults | changes))
