"""Fine-tuning of a SigLIP model on a labelled folder: its sigmoid loss, with its logit bias.

    clip-jax train fine_tune_siglip --init-from hf:OWNER/NAME --data.source.path pets/train \\
        --evals.0.dataset folder:pets

Hardware: one accelerator.
Recipe: FLYP (Goyal et al. 2022, arXiv:2212.00638) with the loss of SigLIP's pre-training. The logit
scale and bias train on from the checkpoint's values.
Expected: no published results. The learning rate is a start; try a third and three times of it.
Notes: Images of one class are left out of the negatives: the sigmoid loss would count each as a
wrong pair of its own. The context length stays 64, on which SigLIP's text tower depends.
"""

import dataclasses

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.losses import SigmoidConfig
from clip_jax.models import zoo


def get_config() -> Config:
    config = load_config("fine_tune_flyp")
    return dataclasses.replace(
        config,
        init_from="hf:OWNER/NAME",
        model=zoo.get("ViT-B-16-SigLIP"),  # whose bfloat16 is kept; the rest is that of init_from
        objective=(SigmoidConfig(mask_same_class=True),),
        optim=dataclasses.replace(config.optim, learning_rate=1e-5, b2=0.95),
    )
