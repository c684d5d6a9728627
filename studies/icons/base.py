"""The study's fixed setting: ten minutes on two CPU cores, in which quality claims are made.

    python studies/icons/prepare.py icons
    clip-jax train studies/icons/base.py --workdir runs/icons

Hardware: two CPU cores, at most ten minutes.
Data: `icons/`, as prepare.py writes it. No set of validation or test icons is trained on.
Measured: `val/acc1` and, at the end, `classes/acc1`: zero-shot top-1 among the classes of
names.txt with synonyms merged, on the validation and the test sets. `validation/info_nce`: the
contrastive loss among 1,024 icons with distinct names. `test/image_retrieval_recall@1` and
`test/text_retrieval_recall@1`: retrieval among 2,048 distinct names.
"""

from pathlib import Path

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.any import PathConfig
from clip_jax.evals.held_out_pairs import PairsEvalConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import SoftmaxConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import CoolDown, Muon, OptimConfig

TEMPLATES = Path(__file__).with_name("templates.txt")
AT_THE_END = 1_000_000  # steps between evaluations; the last step is always evaluated


def get_config() -> Config:
    return Config(
        steps=600,
        batch_size=256,
        model=CLIPConfig(
            embed_dim=128,
            vision=ViTConfig(image_size=32, patch_size=8, width=128, depth=4, num_heads=4),
            text=TextConfig(vocab_size=8_192, context_length=16, width=128, depth=2, num_heads=4),
            dtype="float32",
            image_mean=(0.68, 0.68, 0.72),  # of the training icons; most have a light background
            image_std=(0.39, 0.37, 0.32),
        ),
        data=DataConfig(source=PathConfig(path="icons/train"), crop_scale=(0.8, 1.0), threads=2),
        objective=(SoftmaxConfig(mask_same_caption=True),),
        optim=OptimConfig(
            learning_rate=2e-3,
            warmup_steps=50,
            schedule=CoolDown(steps=150),
            weight_decay=0.1,
            optimizer=Muon(),
        ),
        checkpoint=CheckpointConfig(every_steps=200),
        evals=(
            zero_shot("folder:icons/classes"),
            zero_shot("folder:icons/classes/val", every_steps=200),
            pairs("validation", pairs=1_024),
            pairs("test", pairs=2_048),
        ),
        report_every=50,
    )


def zero_shot(data_set: str, every_steps: int = AT_THE_END) -> SuiteEvalConfig:
    return SuiteEvalConfig(dataset=(data_set,), templates=TEMPLATES, every_steps=every_steps)


def pairs(split: str, pairs: int) -> PairsEvalConfig:
    source = PathConfig(path=f"icons/retrieval/{split}/*.tar")
    return PairsEvalConfig(
        name=split,
        data=DataConfig(source=source, crop="center"),
        pairs=pairs,
        every_steps=AT_THE_END,
    )
