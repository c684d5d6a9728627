r"""dino.txt on DINOv3 L/16: a frozen image tower, a head on its tokens, and a text tower.

    hf download facebook/dinov3-vitl16-pretrain-lvd1689m --local-dir dinov3-vitl16
    clip-jax train dinotxt_l16 --data.source.path 'gs://BUCKET/pairs/*.tar'
    clip-jax plan dinotxt_l16 --topology v5e:4x8

Hardware: one v5e-32 slice; 17 hours at an assumed 40% MFU, $650 at $1.20 per chip-hour. A compiled
step takes 10.9 of 16 GB per chip, and by its schedules 0.68 s (72% MFU).
Recipe: Jose et al. 2024 (dino.txt, arXiv:2412.16334), from DINOv3's `dinov3_vitl_text.yaml` and its
README: 50,000 steps of 256 pairs on each of 32 GPUs, AdamW with learning rate 7e-4 and cosine decay
after 2,000 warm-up steps, weight decay 1e-4, β2 0.99, logit scale from 1/0.07, at most 100. Crops
of 8% to 100% at 224 pixels, flips; 77 tokens of CLIP's BPE, text tower of width 1,280 and depth 24.
Expected: not known for this config, an example of its authors for other data. The paper reports
81.6% ImageNet zero-shot top-1 for DINOv2 L/14 on its authors' own pairs.
Notes: The head has no stochastic depth, for which the recipe has 0.3. The parameters and the
optimizer state are sharded over eight chips; on fewer devices, set `--mesh.fsdp` to their number.
DINOv3's licence applies to the trained model.
"""

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.augment import AugmentConfig
from clip_jax.data.images import Preprocess
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.tar import TarConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import SoftmaxConfig
from clip_jax.models import dino
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.image_head import ImageHeadConfig
from clip_jax.models.images import IMAGENET_MEAN, IMAGENET_STD
from clip_jax.models.text import TextConfig
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig


def get_config() -> Config:
    text = TextConfig(width=1280, depth=24, num_heads=20, activation="gelu", biases="none")
    return Config(
        steps=50_000,
        batch_size=8_192,
        init_from="dinov3-vitl16",
        init_towers=("image",),
        init_differences=("preprocess.*",),  # DINOv3's own processor squashes images
        model=CLIPConfig(
            embed_dim=2048,
            vision=dino.TOWERS["DINOv3-L-16"],
            text=text,
            image_head=ImageHeadConfig(),
            image_mean=IMAGENET_MEAN,
            image_std=IMAGENET_STD,
            remat="residual",
        ),
        preprocess=Preprocess(crop_ratio=0.875),
        data=DataConfig(
            source=TarConfig(path="pairs/*.tar"),
            threads=16,
            crop_scale=(0.08, 1.0),
            augment=AugmentConfig(flip=0.5),
        ),
        objective=(SoftmaxConfig(),),
        optim=OptimConfig(
            learning_rate=7e-4,
            warmup_steps=2_000,
            weight_decay=1e-4,
            b2=0.99,
            eps=1e-8,
            locked=("image",),
        ),
        mesh=MeshConfig(fsdp=8),
        checkpoint=CheckpointConfig(every_steps=500),
        evals=(SuiteEvalConfig(dataset=("imagenet1k",), missing="skip", every_steps=5_000),),
    )
