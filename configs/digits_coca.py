"""The quickstart's digits with a caption decoder: CoCa, which learns to write the numbers.

    clip-jax train configs/digits_coca.py

Hardware: two CPU cores, about 5 minutes. Data, schedule and towers are those of
`configs/digits.py`; the image tower ends in 17 queries, one for the embedding and 16 for two layers
of a decoder. `caption/seen/exact` is how often it writes, word by word, one of the 13 captions of
the number in a held-out writer's hand; `caption/unseen/exact` the same of numbers never trained on.
"""

from dataclasses import replace
from pathlib import Path

from clip_jax.config import Config, run_file
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
