"""Linear probe: only a classifier and the logit scale train, both towers are locked.

    clip-jax sample-data shapes && clip-jax train class_folders
    clip-jax sample-data dark --dark --train 8
    clip-jax train linear_probe
    clip-jax train linear_probe --init-from hf:OWNER/NAME --data.source.path pets/train \\
        --evals.0.dataset folder:pets

Hardware: two CPU cores, about one minute; an accelerator for models of published sizes.
Recipe: CLIP paper, section 3.2, here with AdamW on random crops instead of L-BFGS.
Expected: 65% top-1 on the dark test images (zero-shot: 35%) and 70% on the bright ones of classes
that pre-training has seen (before: 99%), mean of 3 seeds.
Notes: `clip-jax evaluate --tasks probe` fits L-BFGS for a result, and keeps no classifier.
"""

import dataclasses

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.losses import ClassifierConfig


def get_config() -> Config:
    config = load_config("fine_tune_flyp")
    return dataclasses.replace(
        config,
        objective=(ClassifierConfig(templates=config.data.source.templates),),
        optim=dataclasses.replace(
            config.optim, learning_rate=1e-2, weight_decay=0.0, locked=("image", "text")
        ),
    )
