"""Small models of every kind with random weights, and a check of invalid files."""

import contextlib
import functools
import json
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.checkpoints.checksums import digest_of
from clip_jax.checkpoints.manager import CheckpointConfig, Checkpoints
from clip_jax.config import Config
from clip_jax.convert.fitting import starting_params
from clip_jax.convert.formats import read_weights
from clip_jax.convert.state_dict import flatten
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.weights import DType, Head, Weights, default_preprocess
from clip_jax.errors import InputError
from clip_jax.losses import ClassifierConfig, SoftmaxConfig
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.dino import DinoConfig
from clip_jax.models.lora import LoRAConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.models.text import TextConfig, TokenizerConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig, Tower
from clip_jax.serialize import to_dict
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import shapes
from clip_jax.storage.files import AnyPath
from tests.conftest import COCA, MAMMUT, TINY, parameter_shapes

VISION = ViTConfig(image_size=32, patch_size=8, width=128, depth=2, num_heads=2)
TEXT = TextConfig(vocab_size=600, context_length=16, width=64, depth=3, num_heads=1)
VIT = CLIPConfig(embed_dim=48, vision=VISION, text=TEXT)
SIGLIP = zoo.get("ViT-B-16-SigLIP")
_SMALL = {"width": 32, "depth": 2, "num_heads": 2}
_NO_WORDS = TokenizerConfig(file="", clean="punctuation")  # no released vocabulary has 40 tokens

CONFIGS = {
    "vit": VIT,
    "gelu": replace(
        VIT,
        vision=replace(VISION, activation="gelu", num_heads=4),  # 32 channels per head
        text=replace(TEXT, activation="gelu"),
    ),
    "options": replace(
        VIT,
        vision=replace(
            VISION,
            activation="gelu_tanh",
            pool="mean",
            pre_norm=False,
            layer_scale=0.1,
            num_heads=4,
            mlp_ratio=4.3637,
            norm_epsilon=1e-6,
        ),
        text=replace(
            TEXT,
            activation="gelu",
            causal=False,
            pool="last",
            projection_bias=True,
            context_length=9,
            num_heads=4,
            mlp_ratio=3.0,
            vocab_size=49_408,
        ),
        init_logit_scale=10.0,
        init_logit_bias=-10.0,
    ),
    "eos": replace(VIT, text=replace(TEXT, pool="eos", eos_token_id=589)),
    "resnet": replace(
        VIT, vision=ResNetConfig(image_size=64, layers=(1, 2, 1, 3), width=16, num_heads=8)
    ),
    "coca": COCA,
    # With the vocabulary of LAION's, whose tokenizer is built into open_clip.
    "mammut": replace(
        MAMMUT,
        vision=replace(MAMMUT.vision, activation="gelu"),
        text=replace(MAMMUT.text, activation="gelu", vocab_size=49_408),
    ),
    "siglip": replace(
        SIGLIP,
        embed_dim=32,
        vision=replace(SIGLIP.vision, image_size=32, patch_size=8, **_SMALL),
        text=replace(SIGLIP.text, context_length=6, vocab_size=40, tokenizer=_NO_WORDS, **_SMALL),
    ),
}
_SIGLIP = CONFIGS["siglip"]
CONFIGS["naflex"] = replace(_SIGLIP, vision=replace(_SIGLIP.vision, max_patches=20))


@functools.cache
def make_weights(name: str) -> Weights:
    config = CONFIGS[name]
    rng = np.random.default_rng(0)

    def draw(x: jax.ShapeDtypeStruct) -> np.ndarray:
        return rng.normal(size=x.shape).astype(np.float32)

    params = jax.tree.map(draw, parameter_shapes(config))
    preprocess = default_preprocess(config)
    if name == "siglip":
        preprocess = replace(preprocess, resize_mode="squash")
    return Weights(config=config, params=params, preprocess=preprocess)


@pytest.fixture
def siglip() -> Weights:
    return make_weights("siglip")


_TOWER = {"image_size": 32, "patch_size": 8, "width": 32, "depth": 2, "num_heads": 2}
_LEARNED = {"positions": "learned", "biases": "qkv", "norm_epsilon": 1e-6, "layer_scale": 1.0}
# Image towers without a text tower, by the model_type of transformers.
DINO = {
    "dinov2": DinoConfig(**_TOWER, **_LEARNED, resizing="plain", registers=0),
    "dinov2_with_registers": DinoConfig(
        **_TOWER, **_LEARNED, activation="swiglu", mlp_ratio=88 / 32
    ),
    "dinov3_vit": DinoConfig(**_TOWER, registers=2, biases="none", activation="swiglu"),
}


def tower_weights(tower: DinoConfig, only: Tower | None = "image") -> Weights:
    """Draw random weights of an image tower alone, or (None) of a whole model."""
    config = replace(TINY, embed_dim=32, vision=tower)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), parameter_shapes(config)
    )
    params = {"visual": params["visual"]} if only else params
    preprocess = default_preprocess(config)
    return Weights(config=config, params=params, preprocess=preprocess, only_tower=only)


def assert_same(a: Weights, b: Weights) -> None:
    """Check that weights and settings are equal, bit for bit."""
    assert (a.config, a.preprocess) == (b.config, b.preprocess)
    ours, theirs = flatten(a.params), flatten(b.params)
    assert ours.keys() == theirs.keys()
    for path, x in ours.items():
        assert x.dtype == theirs[path].dtype, path
        assert x.tobytes() == theirs[path].tobytes(), path


def cast(weights: Weights, dtype: DType) -> Weights:
    """Return weights with another data type."""
    params = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), weights.params)
    return replace(weights, params=params)


def write_lora_run(
    workdir: Path, base: AnyPath, adapters: LoRAConfig, head: Head | None = None
) -> Path:
    """Write a LoRA run after step 1, as `train` does; `head` adds a classifier."""
    objective = (SoftmaxConfig(),)
    if head is not None:
        objective = (ClassifierConfig(classes=head.classes, templates=head.templates),)
    config = Config(
        model=replace(read_weights(base).config, dtype="float32"),
        init_from=str(base),
        lora=adapters,
        objective=objective,
        steps=1,
        optim=OptimConfig(warmup_steps=0),
    )
    rng = np.random.default_rng(0)
    state, _ = shapes(config.recipe, make_mesh(MeshConfig()))
    drawn = jax.tree.map(lambda x: rng.normal(0, 0.05, x.shape).astype(x.dtype), state.saved())
    if head is not None:
        drawn["params"]["classifier"]["kernel"] = head.kernel
    workdir.mkdir()
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    digest = digest_of(starting_params(read_weights(base), config.model))
    with contextlib.closing(
        Checkpoints(workdir / "checkpoints", CheckpointConfig())
    ) as checkpoints:
        checkpoints.save(1, jax.tree.map(jnp.asarray, drawn), {"samples": 1, "base": digest})
    return workdir


MAX_MEMORY = 64 << 20  # bytes, whatever the file claims


def refuse(path: Path, match: str, read: Callable[[Path], object] = read_tensors) -> None:
    """Check that reading a file is a short error with its path, and takes little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=match) as error:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < MAX_MEMORY
    finally:
        tracemalloc.stop()
    assert str(path) in str(error.value)
    assert len(str(error.value)) < 1000
