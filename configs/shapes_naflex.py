"""Drawn shapes on canvases of 1:3 to 3:1, at their own aspect ratio (NaFlex), on a CPU.

    clip-jax sample-data canvases --aspect 3 --train 200
    clip-jax train shapes_naflex

Hardware: two CPU cores, at most 9 minutes.
Expected: 92% zero-shot top-1 on the test images of 24 classes at 64 patches, and 90% at 36. At 64
that is 99% on the 20 classes of the training set, and about 58% on four unseen combinations of
known colours and shapes.
Notes: Each batch has sequences of 36 or 64 patches, at about the same number of patches in total.
Without random crops, no shape is cut off.
"""

from clip_jax.checkpoints.retention import CheckpointConfig
from clip_jax.config import Config
from clip_jax.data.batch_plan import TokenBudget
from clip_jax.data.pipeline import DataConfig
from clip_jax.data.sources.image_folder import FolderConfig
from clip_jax.evals.suite import SuiteEvalConfig
from clip_jax.losses import SoftmaxConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig


def get_config() -> Config:
    return Config(
        steps=600,
        batch_size=64,
        lengths=TokenBudget(patches=(36, 64), multiple=16),
        model=CLIPConfig(
            embed_dim=64,
            vision=ViTConfig(
                image_size=64, patch_size=8, max_patches=64, width=96, depth=4, num_heads=4
            ),
            text=TextConfig(vocab_size=4_096, context_length=16, width=64, depth=2, num_heads=2),
            dtype="float32",
        ),
        data=DataConfig(
            source=FolderConfig(
                path="canvases/folders/train",
                templates=("a photo of a {}", "a drawing of a {}", "a {}"),
            ),
            threads=1,
        ),
        objective=(SoftmaxConfig(mask_same_caption=True),),
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=100, weight_decay=0.1),
        checkpoint=CheckpointConfig(every_steps=200),
        evals=(SuiteEvalConfig(dataset=("folder:canvases/folders",), every_steps=200),),
        report_every=50,
    )
