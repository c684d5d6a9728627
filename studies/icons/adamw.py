"""base.py with AdamW, which open_clip has, too.

    clip-jax train studies/icons/adamw.py --workdir runs/adamw

Hardware: two CPU cores, at most ten minutes.
Recipe: base.py, but for the optimizer and its learning rate.
"""

from dataclasses import replace
from pathlib import Path

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.optim import AdamW


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("base.py"))
    optim = replace(base.optim, optimizer=AdamW(), learning_rate=1e-3)
    return replace(base, optim=optim)
