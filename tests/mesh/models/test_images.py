"""A user's tower for images that are not square, from files to training and evaluation."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import linen as nn
from PIL import Image

from clip_jax.data.batch_plan import constant
from clip_jax.data.images import Preprocess
from clip_jax.data.pipeline import DataConfig, build
from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
from clip_jax.evals.datasets import Captioned
from clip_jax.evals.evaluator import Encoder
from clip_jax.evals.reader import Splits
from clip_jax.evals.zero_shot import zero_shot
from clip_jax.inference.loading import Model
from clip_jax.models.clip import CLIP, CLIPConfig
from clip_jax.models.images import Patches
from clip_jax.models.layers import named
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig
from clip_jax.sharding import MeshConfig, make_mesh
from clip_jax.step import Program, Recipe
from tests.data.conftest import make_pairs, table

PATCH, LENGTH = 4, 24


@dataclasses.dataclass(frozen=True)
class Packed:
    """At most LENGTH patches, in a grid with about the image's aspect ratio."""

    side: int = 4 * PATCH
    max_patches = None

    def fit(self, width, height):
        rows = max(1, min(LENGTH, math.floor(math.sqrt(LENGTH * height / width))))
        columns = max(1, min(LENGTH // rows, round(rows * width / height)))
        return columns * PATCH, rows * PATCH

    def pack(self, pixels):
        rows, columns = pixels.shape[1] // PATCH, pixels.shape[2] // PATCH
        cut = rearrange(pixels, "B (h P) (w Q) C -> B (h w) (P Q C)", P=PATCH, Q=PATCH)
        empty = [(0, 0), (0, LENGTH - rows * columns), (0, 0)]
        grid = np.full((len(pixels), 2), (rows, columns), np.int32)
        return Patches(np.pad(cut, empty), grid, np.full(len(pixels), rows * columns, np.int32))

    def shapes(self, batch_size):
        return Patches(
            jax.ShapeDtypeStruct((batch_size, LENGTH, PATCH * PATCH * 3), jnp.uint8),
            jax.ShapeDtypeStruct((batch_size, 2), jnp.int32),
            jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        )

    def check(self, images):
        assert images.pixels.shape[1:] == (LENGTH, PATCH * PATCH * 3)


class PackedTower(nn.Module):
    """Projects patches, adds their rows as positions, and averages the valid ones."""

    embed_dim: int

    @nn.compact
    def __call__(self, images, keys=None, *, train=False):
        init = named("- E", nn.initializers.normal(0.2))
        kernel = self.param("kernel", init, (PATCH * PATCH * 3, self.embed_dim))
        number = jnp.arange(LENGTH)
        row = number // jnp.maximum(images.grid[:, 1:], 1)
        x = nn.relu(images.pixels @ kernel + row[..., None] / LENGTH)
        valid = number < images.length[:, None]
        return (x * valid[..., None]).sum(1) / jnp.maximum(images.length, 1)[:, None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedConfig(ViTConfig):
    """The tower's configuration."""

    @property
    def image_spec(self):
        return Packed()

    def module(self, embed_dim, remat, unroll, layout):
        return PackedTower(embed_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedPreprocess(Preprocess):
    """Resizes an image to the nearest grid of patches."""

    image_size: int = 16
    resize_mode: Literal["shortest", "squash", "longest"] = "squash"

    @property
    def image_spec(self):
        return Packed()


CONFIG = CLIPConfig(
    embed_dim=16,
    vision=PackedConfig(image_size=16, patch_size=PATCH, width=32, depth=1, num_heads=2),
    text=TextConfig(vocab_size=520, context_length=10, width=16, depth=1, num_heads=2),
    dtype="float32",
)
TOKENIZER = ClipTokenizer(520)
SIZES = [(16 + 9 * i, 70 - 3 * i) for i in range(11)]  # widths and heights


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for width, height in SIZES]


@pytest.fixture(scope="module")
def program():
    recipe = Recipe(model=CONFIG, optim=OptimConfig(warmup_steps=1), steps=4, batch_size=16)
    return Program(recipe, make_mesh(MeshConfig(data=4, fsdp=2)))


@pytest.mark.parametrize("crop_scale", [None, (0.3, 1.0)])
def test_packed_patches_are_trained_on(program, tmp_path, crop_scale):
    """From files to a training step on eight devices, each with its rows of every array."""
    config = DataConfig(source=table(tmp_path, make_pairs(20)), crop_scale=crop_scale)
    pipeline = build(
        config,
        constant(16, CONFIG.vision.image_spec),
        tokenizer=TOKENIZER,
        context_length=10,
    )
    batches = pipeline.batches()
    batch = next(batches)
    batches.close()
    assert isinstance(batch.image, Patches)
    np.testing.assert_array_equal(batch.image.length, batch.image.grid.prod(1))
    assert len(set(map(tuple, batch.image.grid))) > 1  # pictures of several shapes
    on_mesh = program.put(batch)
    assert jax.tree.structure(on_mesh) == jax.tree.structure(program.batch)
    for expected, array in zip(
        jax.tree.leaves(program.batch), jax.tree.leaves(on_mesh), strict=True
    ):
        assert (array.shape, array.dtype, array.sharding) == (
            expected.shape,
            expected.dtype,
            expected.sharding,
        )
    assert {x.data.shape[0] for x in on_mesh["image"].grid.addressable_shards} == {2}
    _, metrics = program.step(program.init(), on_mesh)
    assert np.isfinite(metrics["loss"])
    assert metrics["grad_norm"] > 0


def expected_features(params, preprocess, images):
    """Encode each image alone."""
    clip = CLIP(CONFIG)
    encode = jax.jit(lambda image: clip.encode_image(params, clip.normalize(image)))
    return np.concatenate([encode(preprocess.batch(image)) for image in images])


def test_packed_patches_are_evaluated_and_embedded(program):
    """The last batch of eleven images is padded; padding does not change the results."""
    images, preprocess = pictures(), PackedPreprocess()
    params = jax.tree.map(np.asarray, jax.jit(CLIP(CONFIG).init)(jax.random.key(0)))
    preprocess = dataclasses.replace(preprocess, mean=CONFIG.image_mean, std=CONFIG.image_std)
    features = expected_features(params, preprocess, images)
    assert np.linalg.norm(features - features.mean(0), axis=1).min() > 1e-3

    model = Model(CONFIG, params, preprocess)
    for batch_size in (8, 64):
        got = model.encode_image(model.preprocess(images), batch_size=batch_size)
        np.testing.assert_allclose(got, features, atol=1e-5)

    encoder = Encoder(
        CLIP(CONFIG),
        jax.device_put(params),
        program.mesh,
        preprocess,
        lambda texts: TOKENIZER(list(texts), 10, True),
    )
    data = Captioned(len(images), lambda i: (Image.fromarray(images[i]), [f"picture {i}"]))
    splits = Splits("pictures", lambda split: data, encoder)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(splits.embedded("test").features, unit, atol=1e-5)
    values = zero_shot(data, splits.embedded("test"), encoder).values
    assert 0 <= values["image_retrieval_recall@5"] <= 1
