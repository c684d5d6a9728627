"""The bundled model `icons`: base.py with larger towers and twelve times as many pairs.

    python studies/icons/prepare.py icons
    clip-jax train studies/icons/released.py --workdir runs/released

Hardware: two CPU cores, two hours.
Measured: as in base.py. `ship.py` makes the model folder of the finished run.
"""

from dataclasses import replace
from pathlib import Path

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.optim import CoolDown


def get_config() -> Config:
    base = load_config(Path(__file__).with_name("base.py"))
    vision = replace(base.model.vision, width=160, depth=5, num_heads=5)
    return replace(
        base,
        steps=3_600,
        batch_size=512,
        model=replace(base.model, embed_dim=160, vision=vision),
        optim=replace(base.optim, warmup_steps=100, schedule=CoolDown(steps=900)),
    )
