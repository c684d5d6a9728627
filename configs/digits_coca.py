"""The digits with a caption decoder: a small CoCa that learns to write the numbers.

    clip-jax train digits_coca

Hardware: two CPU cores, about 5 minutes.
Recipe: data, schedule and towers of `digits`. The image tower ends in 17 queries: one for the
embedding, 16 for a decoder of two layers.
Expected: 97 to 98% of the captions are right for numbers seen in training, 93 to 95% for unseen
numbers (BENCHMARKS.md).
Notes: `caption/seen/exact` is the share of held-out images whose caption is, word for word, one of
the 13 captions of the number. `caption/unseen/exact` is the same for unseen numbers.
"""

from dataclasses import replace
from pathlib import Path

from clip_jax.config import Config
from clip_jax.config_files import run_file
from clip_jax.losses import CaptionConfig
from clip_jax.models.decoder import CoCaConfig


def get_config() -> Config:
    digits = run_file(Path(__file__).with_name("digits.py"), "get_config", Config)
    model = digits.model
    return replace(
        digits,
        objective=(*digits.objective, CaptionConfig(weight=2.0)),
        model=replace(
            model,
            vision=replace(model.vision, pool="queries", pool_queries=17, pool_heads=4),
            text=replace(model.text, pool="class_token"),
            decoder=CoCaConfig(depth=2, num_heads=2),
        ),
    )
