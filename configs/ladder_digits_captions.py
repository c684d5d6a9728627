"""CLIP, CoCa and MaMMUT compared: four-digit numbers, one width, three sample counts.

    clip-jax scale ladder ladder_digits_captions --jobs 2
    clip-jax scale collect runs/ladder_digits_captions --output captions.csv
    clip-jax scale report captions.csv --metric info_nce --metric-is error --output captions.html

Hardware: two CPU cores, about ten minutes (`--dry-run` estimates 0.25 core hours).
Recipe: towers, data, learning rates and error of `ladder_digits` at width 40.
Notes: A pair costs CoCa and MaMMUT more FLOPs than CLIP. So the report's axis is FLOPs, at which
MaMMUT's paper compares them (arXiv:2303.16839, section 4).
"""

from dataclasses import replace
from pathlib import Path

from clip_jax.losses import CaptionConfig
from clip_jax.models.decoder import CoCaConfig, MaMMUTConfig
from clip_jax.scaling.ladder import LadderConfig, load_ladder


def get_ladder() -> LadderConfig:
    own = load_ladder(Path(__file__).with_name("ladder_digits.py"))
    clip = replace(own.models["w40"], embed_dim=40)  # MaMMUT's text tower has no projection
    coca = replace(
        clip,
        vision=replace(clip.vision, pool="queries", pool_queries=17, pool_heads=5),
        text=replace(clip.text, pool="class_token"),
        decoder=CoCaConfig(depth=2, num_heads=5),
    )
    mammut = replace(
        clip,
        vision=replace(clip.vision, pool="mean_all"),
        text=replace(clip.text, pool="mean", causal=False, projection=False),
        decoder=MaMMUTConfig(cross_every=1),
    )
    return replace(
        own,
        # The caption term is left out for models without a decoder.
        base=replace(own.base, objective=(*own.base.objective, CaptionConfig(weight=1.0))),
        models={"clip": clip, "coca": coca, "mammut": mammut},
        samples=(12_288, 24_576, 49_152),
        seeds=(0,),
    )
