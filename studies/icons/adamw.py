"""base.py with AdamW and a cosine, which open_clip has, too.

    clip-jax train studies/icons/adamw.py --workdir runs/adamw

Hardware: two CPU cores, at most ten minutes.
Recipe: base.py, but for the optimizer, its learning rate (the best of those in variants.py) and the
schedule.
"""

from dataclasses import replace
from pathlib import Path

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.optim import AdamW, Cosine


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("base.py"))
    optim = replace(base.optim, optimizer=AdamW(), learning_rate=5e-4, schedule=Cosine())
    return replace(base, optim=optim)
