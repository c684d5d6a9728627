"""The digits' ladder with cool-down branches: one parent run per model and seed.

    clip-jax scale ladder ladder_digits_branches --jobs 2
    clip-jax scale collect runs/ladder_digits runs/ladder_digits_branches --output both.csv
    clip-jax scale fit both.csv --metric info_nce --metric-is error --compare schedule

Hardware: two CPU cores, about half an hour (`--dry-run` estimates 0.84 core hours).
Notes: The points are those of `ladder_digits`, for 63% of its FLOPs: each sample count is a branch
of the parent run.
"""

from dataclasses import replace
from pathlib import Path

from clip_jax.scaling.ladder import BranchesConfig, LadderConfig, load_ladder


def get_ladder() -> LadderConfig:
    own = load_ladder(Path(__file__).with_name("ladder_digits.py"))
    return replace(own, branches=BranchesConfig(share=0.2, shape="sqrt"))
