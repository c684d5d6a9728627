"""The digits' ladder by cool-downs: one parent run a model and seed, a branch for each count.

    clip-jax scale ladder configs/ladder_digits_branches.py --jobs 2
    clip-jax scale collect runs/ladder_digits runs/ladder_digits_branches --output both.csv
    clip-jax scale fit both.csv --metric info_nce --metric-is error --compare schedule

The same points as configs/ladder_digits.py, for 63% of its FLOPs.
"""

from dataclasses import replace
from pathlib import Path

from clip_jax.scaling.ladder import BranchesConfig, LadderConfig, load_ladder


def get_ladder() -> LadderConfig:
    own = load_ladder(Path(__file__).with_name("ladder_digits.py"))
    return replace(own, branches=BranchesConfig(share=0.2, shape="sqrt"))
