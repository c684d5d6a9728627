"""A model that takes no training, as a folder."""

from pathlib import Path

import jax
import numpy as np

from clip_jax.convert.formats import write_weights
from clip_jax.convert.weights import Weights, default_inputs
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

TINY = CLIPConfig(
    embed_dim=16,
    vision=ViTConfig(image_size=16, patch_size=8, width=32, depth=1, num_heads=2),
    text=TextConfig(vocab_size=520, context_length=12, width=32, depth=1, num_heads=2),
)


def write_tiny_model(folder: Path, seed: int = 0, config: CLIPConfig = TINY) -> None:
    """Write a model folder with random weights."""
    params = jax.tree.map(np.asarray, jax.jit(CLIP(config).init)(jax.random.key(seed)))
    preprocess, tokenizer = default_inputs(config)
    weights = Weights(config=config, params=params, preprocess=preprocess, tokenizer=tokenizer)
    write_weights(weights, folder, "clip-jax")
