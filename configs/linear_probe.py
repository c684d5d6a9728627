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

from clip_jax.checkpoints.manager import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.image_folder import FolderConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import ClassifierConfig
from clip_jax.optim import OptimConfig


def get_config() -> Config:
    templates = ("a photo of a {}", "a drawing of a {}", "a {}")
    return Config(
        steps=100,
        batch_size=64,
        init_from="runs/class_folders",
        init_architecture=True,
        data=DataConfig(
            source=FolderConfig(path="dark/folders/train", templates=templates),
            crop_scale=(0.8, 1.0),
            threads=1,
        ),
        objective=(ClassifierConfig(templates=templates),),
        optim=OptimConfig(
            learning_rate=1e-2, warmup_steps=10, weight_decay=0.0, locked=("image", "text")
        ),
        checkpoint=CheckpointConfig(every_steps=100),
        evals=(
            SuiteEvalConfig(
                dataset=("folder:dark/folders", "folder:shapes/folders"), every_steps=100
            ),
        ),
        report_every=20,
    )
