"""Small models of each family with weights that move every number, and what they compute."""

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import pytest

from clip_jax.convert.verify import our_outputs
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.images import Images, Patches, concatenate
from clip_jax.models.text import TokenizerConfig
from clip_jax.models.vit import ViTConfig
from tests import conftest, vocabularies
from tests.conftest import COCA, MAMMUT, RESNET, ROOT, TINY, batch, parameters

RULES = TokenizerConfig(file="", clean="punctuation", end_id=1, pad_id=1)


SIGLIP, SMALL = zoo.get("ViT-B-16-SigLIP"), {"width": 32, "depth": 2, "num_heads": 2}


def naflex(config: CLIPConfig) -> CLIPConfig:
    """The same model for at most 24 patches, with position embeddings of 3 x 3 patches."""
    return replace(config, vision=replace(config.vision, image_size=24, max_patches=24))


def with_pool(config: CLIPConfig, pool: str, **changes: Any) -> CLIPConfig:
    return replace(config, vision=replace(config.vision, pool=pool, **changes))


FAMILIES = {
    "clip": TINY,
    "mean": replace(
        TINY,
        vision=ViTConfig(
            image_size=16,
            patch_size=8,
            width=32,
            depth=2,
            num_heads=2,
            pool="mean",
            pre_norm=False,
            layer_scale=0.5,
            activation="gelu",
            mlp_ratio=3.3,
        ),
        text=replace(TINY.text, pool="eos", eos_token_id=519, activation="gelu_tanh"),
    ),
    "resnet": RESNET,
    "coca": COCA,
    # Another depth and width than the image tower's, no pool of queries, the released models' mask.
    "coca_wrong_mask": replace(
        COCA,
        vision=replace(TINY.vision, depth=1),
        text=replace(COCA.text, correct_class_mask=False),
    ),
    "mammut": MAMMUT,
    "siglip": replace(
        SIGLIP,
        embed_dim=32,
        dtype="float32",
        # 35 pixels: three of them belong to no patch
        vision=replace(SIGLIP.vision, image_size=35, patch_size=8, **SMALL),
        text=replace(SIGLIP.text, context_length=16, vocab_size=520, tokenizer=RULES, **SMALL),
    ),
}
FAMILIES["naflex"] = naflex(FAMILIES["siglip"])
FAMILIES |= conftest.FAMILIES
# Each pool, with and without a class token, whose tokens a decoder attends to.
WRITERS = {
    "class_token": FAMILIES["coca_wrong_mask"],
    "mean": with_pool(FAMILIES["coca_wrong_mask"], "mean"),
    "mean_all": MAMMUT,
    "map": with_pool(FAMILIES["coca_wrong_mask"], "map", class_token=False),
    "queries": COCA,
}
FAMILIES |= {f"naflex_{pool}": naflex(config) for pool, config in WRITERS.items()}
SQUARE = [name for name in FAMILIES if "naflex" not in name]
NAFLEX = [name for name in FAMILIES if "naflex" in name]


def patches(config: CLIPConfig, grids: Sequence[tuple[int, int]]) -> Patches:
    """Draw images of these rows and columns of patches; values in the padding are random, too."""
    spec = config.vision.image_spec
    shapes = [(1, spec.patch_size * down, spec.patch_size * across, 3) for down, across in grids]
    images = concatenate([spec.pack(np.zeros(shape, np.uint8)) for shape in shapes])
    drawn = np.random.default_rng(len(grids)).normal(size=images.pixels.shape)
    return replace(images, pixels=drawn.astype(np.float32))


def shorter(family: "Family") -> "Family":
    """The family with images of other shapes, padded to half as many patches."""
    config = family.weights.config
    vision = replace(config.vision, max_patches=12)
    images = patches(replace(config, vision=vision), [(7, 1), (1, 1), (3, 4)])
    ours = our_outputs(config, family.weights.params, images, family.tokens)
    return replace(family, images=images, ours=ours)


def rows(images: Images, size: int) -> Images:
    """The first few images."""
    return jax.tree.map(lambda x: x[:size], images)


def programs():
    """Return the page's programs: StableHLO's towers and captions, ONNX's captions."""
    page = (ROOT / "docs/how-to/export.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    marks = ("text_features = ", "caption_next", "caption_model")
    return [next(block for block in blocks if mark in block) for mark in marks]


@dataclass(frozen=True)
class Family:
    """A model, normalised pixels and token ids of three rows, and what it computes of them."""

    weights: Weights
    images: Images
    tokens: np.ndarray
    ours: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """A model of a family by name, with its vocabulary."""

    @functools.cache
    def make_family(name: str) -> Family:
        config = FAMILIES[name]
        if name in ("siglip", "naflex"):
            words = tmp_path_factory.mktemp("words") / "spiece.model"
            vocabularies.sentencepiece_model(words)
            rules = replace(RULES, file=str(words))
            config = replace(config, text=replace(config.text, tokenizer=rules))
        params, made = jax.tree.map(np.asarray, parameters(config)), batch(config, 64)
        weights = Weights(config=config, params=params, preprocess=default_preprocess(config))
        tokens = made["text"][:3]
        tokens[1, -4:] = [519, 0, 0, 0]  # which some models see, and some may not
        if name in NAFLEX:
            positions = params["visual"]["positional_embedding"]
            positions *= np.float32(5)  # of unit variance, so that a wrong resizing is seen
            images = patches(config, [(3, 5), (1, 24), (2, 2)])
        else:
            images = (made["image"][:3] / 127.5 - 1).astype(np.float32)
        ours = our_outputs(config, params, images, tokens)
        return Family(weights, images, tokens, ours)

    return make_family


@pytest.fixture
def clip(families: Callable[[str], Family]) -> Family:
    """The first of them."""
    return families("clip")
