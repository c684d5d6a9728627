"""Fine-tuning on a labelled folder by the pre-training loss (FLYP).

    clip-jax sample-data shapes && clip-jax train class_folders
    clip-jax sample-data dark --dark --train 8
    clip-jax train fine_tune_flyp
    clip-jax train fine_tune_flyp --init-from hf:OWNER/NAME --data.source.path pets/train \\
        --evals.0.dataset folder:pets

Hardware: two CPU cores, about one minute; an accelerator for models of published sizes.
Recipe: Goyal et al. 2022 (FLYP, arXiv:2212.00638). Both towers train by the contrastive loss, and
each sample draws one of the prompts. Images of one class are negatives of each other, as published;
`--objective.0.mask-same-class` leaves them out.
Expected: 91% top-1 on the dark test images (zero-shot: 35%) and 85% on the bright ones of classes
that pre-training has seen (before: 99%), mean of 3 seeds.
Notes: This loss leaves out the logit bias of SigLIP; `fine_tune_siglip` keeps it.
"""

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.image_folder import FolderConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import SoftmaxConfig
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
        objective=(SoftmaxConfig(mask_same_class=False),),
        optim=OptimConfig(learning_rate=5e-4, warmup_steps=10, weight_decay=0.1),
        checkpoint=CheckpointConfig(every_steps=100),
        evals=(
            SuiteEvalConfig(
                dataset=("folder:dark/folders", "folder:shapes/folders"), every_steps=100
            ),
        ),
        report_every=20,
    )
