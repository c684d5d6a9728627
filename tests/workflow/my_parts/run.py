"""A tiny run of which everything that can be a user's is: loss, tower, evaluator, source."""

import os
from dataclasses import replace
from pathlib import Path

from clip_jax.config import Config
from clip_jax.config_files import load_config
from clip_jax.sharding import MeshConfig
from tests.workflow.my_parts.hard_negatives import HardNegativeConfig
from tests.workflow.my_parts.image_retrieval import ImageRetrievalConfig
from tests.workflow.my_parts.json_images import JsonImagesConfig
from tests.workflow.my_parts.mixer import MlpMixerConfig

DATA = Path(os.environ.get("MY_DATA", "data"))  # with pairs.b64 and the folders of classes


def get_config() -> Config:
    run = load_config("digits")
    tower = MlpMixerConfig(
        image_size=16, patch_size=4, width=16, depth=2, token_width=8, mlp_width=32
    )
    return replace(
        run,
        steps=12,
        batch_size=16,
        report_every=1,
        model=replace(run.model, embed_dim=16, vision=tower),
        objective=(HardNegativeConfig(),),
        data=replace(run.data, source=JsonImagesConfig(path=str(DATA / "pairs.b64"))),
        evals=(ImageRetrievalConfig(folder=str(DATA / "classes"), every_steps=6),),
        optim=replace(run.optim, warmup_steps=2),
        checkpoint=replace(run.checkpoint, every_steps=3),
        mesh=MeshConfig(data=4, fsdp=2),
    )
