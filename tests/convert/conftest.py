"""Small models of every kind with random weights, made without PyTorch."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from clip_jax.convert.weights import Weights, default_inputs
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

VISION = ViTConfig(image_size=32, patch_size=8, width=128, depth=2, num_heads=2)
TEXT = TextConfig(vocab_size=600, context_length=16, width=64, depth=3, num_heads=1)
VIT = CLIPConfig(embed_dim=48, vision=VISION, text=TEXT)

CONFIGS = {
    "vit": VIT,
    "gelu": replace(
        VIT, vision=replace(VISION, activation="gelu"), text=replace(TEXT, activation="gelu")
    ),
    "options": replace(
        VIT,
        vision=replace(
            VISION, activation="gelu_tanh", pool="mean", pre_norm=False, layer_scale=0.1,
            num_heads=4, mlp_ratio=4.3637, norm_epsilon=1e-6,
        ),
        text=replace(
            TEXT, activation="gelu", causal=False, pool="last", projection_bias=True,
            context_length=9, num_heads=4, mlp_ratio=3.0, vocab_size=49_408,
        ),
        init_logit_scale=10.0, init_logit_bias=-10.0,
    ),
    "eos": replace(VIT, text=replace(TEXT, pool="eos", eos_token_id=589)),
    "resnet": replace(
        VIT, vision=ResNetConfig(image_size=64, layers=(1, 2, 1, 1), width=16, num_heads=8)
    ),
}  # fmt: skip


def random_weights(config: CLIPConfig, dtype: str = "float32") -> Weights:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(CLIP(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(dtype), shapes)
    preprocess, tokenizer = default_inputs(config)
    return Weights(config=config, params=params, preprocess=preprocess, tokenizer=tokenizer)


@pytest.fixture(params=CONFIGS)
def weights(request):
    return random_weights(CONFIGS[request.param])


@pytest.fixture
def make_weights():
    return lambda name, dtype="float32": random_weights(CONFIGS[name], dtype)
