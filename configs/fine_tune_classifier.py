"""Fine-tuning of the image tower with a classifier on a labelled folder.

    clip-jax sample-data shapes && clip-jax train class_folders
    clip-jax sample-data dark --dark --train 8
    clip-jax train fine_tune_classifier
    clip-jax train fine_tune_classifier --init-from hf:OWNER/NAME --data.source.path pets/train \\
        --evals.0.dataset folder:pets

Hardware: two CPU cores, about one minute; an accelerator for models of published sizes.
Recipe: Wortsman et al. 2021 (WiSE-FT, arXiv:2109.01903). The classifier begins as the zero-shot
one, from the prompts below; the text tower is locked, since nothing changes it. Layer decay as in
BEiT (arXiv:2106.08254), label smoothing 0.1.
Expected: 86% top-1 on the dark test images (zero-shot: 35%) and 86% on the bright ones of classes
that pre-training has seen (before: 99%), mean of 3 seeds.
Notes: `--init-from runs/linear_probe` begins with a trained classifier (LP-FT, Kumar et al. 2022,
arXiv:2202.10054). `clip-jax average BASE RUN OUT --curve 0 0.5 1` joins both models.
"""

import dataclasses

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.losses import ClassifierConfig


def get_config() -> Config:
    config = load_config("fine_tune_flyp")
    templates = config.data.source.templates
    return dataclasses.replace(
        config,
        objective=(ClassifierConfig(templates=templates, label_smoothing=0.1),),
        optim=dataclasses.replace(config.optim, layer_decay=0.75, locked=("text",)),
    )
