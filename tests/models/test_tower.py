"""What every tower answers, and a tower written from its base class alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from clip_jax import flops, sharding
from clip_jax.convert.state_dict import flatten, unflatten
from clip_jax.convert.weights import Weights, with_input
from clip_jax.errors import InputError
from clip_jax.models import lora, zoo
from clip_jax.models.clip import CLIP, CLIPConfig, parameters
from clip_jax.models.layers import MLP, BlockInit, Einsum, Layout, Operations, Remat, named, uniform
from clip_jax.models.tower import Arrays, ImageTowerConfig, TextTowerConfig, parts_of
from clip_jax.optim.wrappers import scale_layers
from clip_jax.sharding import make_mesh
from tests import conftest
from tests.conftest import (
    CAPPA,
    COCA,
    FAMILIES,
    MAMMUT,
    MESHES,
    NAFLEX_SIGLIP,
    RESNET,
    TINY,
    types_unchecked,
)

pytestmark = pytest.mark.usefixtures("unchecked_types")


@dataclass(frozen=True, kw_only=True)
class BareConfig(ImageTowerConfig):
    """Image tower: an MLP-Mixer (arXiv:2105.01601), with the two answers that have no default."""

    image_size: int = 32  # Height and width of input images, in pixels.
    patch_size: int = 8  # Height and width of a patch, in pixels.
    width: int = 16  # Channels.
    depth: int = 2  # Number of layers.

    def module(self, embed_dim: int, remat: Remat, unroll: int, layout: Layout) -> nn.Module:
        return Mixer(self, embed_dim)

    def operations(self, embed_dim: int, *, training: bool = False) -> Operations:
        patches, width = (self.image_size // self.patch_size) ** 2, self.width
        layer = 2 * patches * width * (patches + width)
        stem = patches * 3 * self.patch_size**2 * width
        return Operations(macs=stem + self.depth * layer + width * embed_dim)


@dataclass(frozen=True, kw_only=True)
class MixerConfig(BareConfig):
    """The same, which also has layers, a part in plans, and other sizes."""

    has_linear_patches = True
    parts = (("token MLP", r"/tokens_\d/"),)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_layers(self) -> int:
        return self.depth

    @property
    def first_layers(self) -> Mapping[str, int]:
        layers = {
            f"{kind}_{i}": i + 1 for i in range(self.depth) for kind in ("tokens", "channels")
        }
        return {"stem": 0} | layers

    def fit(self, params: Arrays, before: Any) -> Arrays:
        """Resize the patches of each token MLP, both of its inputs and of its outputs."""
        side = self.image_size // self.patch_size
        old_side = before.image_size // before.patch_size

        def resized(path: str, x: np.ndarray) -> Any:
            if "/tokens_" not in path:
                return x
            axes = [axis for axis, size in enumerate(x.shape) if size == before.num_patches]
            for axis in axes:
                y = np.moveaxis(x, axis, 0)
                y = y.reshape(old_side, old_side, *y.shape[1:])
                y = np.asarray(jax.image.resize(y, (side, side, *y.shape[2:]), "linear"))
                x = np.moveaxis(y.reshape(self.num_patches, *y.shape[2:]), 0, axis)
            return x

        return {path: resized(path, x) for path, x in params.items()}


class Mixer(nn.Module):
    config: BareConfig
    embed_dim: int

    @nn.compact
    def __call__(
        self, images: Float[Array, "B H W C"], keys: Any = None, *, train: bool = False
    ) -> Float[Array, "B E"]:
        c, patch = self.config, self.config.patch_size
        c.image_spec.check(images)
        x = rearrange(images, "B (h P) (w Q) C -> B (h w) P Q C", P=patch, Q=patch)
        init = uniform((3 * patch**2) ** -0.5)
        shape = (patch, patch, 3, c.width)
        x = Einsum("BLPQC,PQCD->BLD", shape, (c.width,), init, name="stem")(x)
        for i in range(c.depth):
            for kind in ("tokens", "channels"):
                y = x.swapaxes(1, 2) if kind == "tokens" else x
                size = y.shape[-1]
                y = MLP(size, "gelu", BlockInit.image(size, size), name=f"{kind}_{i}")(y)
                x = x + (y.swapaxes(1, 2) if kind == "tokens" else y)
        projection = named("D E", nn.initializers.normal(c.width**-0.5))
        kernel = self.param("projection", projection, (c.width, self.embed_dim))
        return x.mean(1) @ kernel.astype(x.dtype)


with types_unchecked():
    MIXER = replace(TINY, vision=MixerConfig())
WIDE_COCA = replace(COCA, vision=replace(COCA.vision, width=48))
MODELS = FAMILIES | {
    "clip": TINY,
    "wide_coca": WIDE_COCA,
    "resnet": RESNET,
    "coca": COCA,
    "mammut": MAMMUT,
    "cappa": CAPPA,
    "naflex": NAFLEX_SIGLIP,
    "mixer": MIXER,
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> CLIPConfig:
    return MODELS[request.param]


def test_each_parameter_has_a_layer_or_none(model):
    """Every module that a tower lists exists; each of its layers has parameters."""
    paths = [path for path in parameters(model) if not path.startswith("batch_stats")]
    for name, tower in model.towers.items():
        inside = [path.partition("/")[2] for path in paths if path.startswith(f"{name}/")]
        layers = {tower.layer_of(path) for path in inside}
        count = tower.num_layers
        assert layers <= {None, *range(count + 1)}
        if count and name not in ("decoder", "image_head"):
            assert {0, 1, None} <= layers  # inputs, the first layer, and the projection or norm
    from_end = {model.layers_from(path) for path in paths}
    assert min(from_end) == 0
    for path, box in parameters(model).items():
        if "depth" in box.names:  # a stack ends within its tower
            depth = box.value.shape[box.names.index("depth")]
            assert 0 < depth <= model.layers_from(path)
    assert model.layers_from("logit_scale") == 0


def test_position_embeddings_are_at_their_path(model):
    path, vision = model.vision.positions_path, model.vision
    embeddings = [name for name in parameters(model) if name.startswith("visual/")]
    embeddings = [name for name in embeddings if name.endswith("positional_embedding")]
    assert embeddings == ([] if path is None else [path])
    if path is not None:
        rows = parameters(model)[path].value.shape[0]
        assert rows == vision.extra_positions + vision.grid**2


def test_every_answer_has_its_type(model):
    vision, text = model.vision, model.text
    assert isinstance(vision, ImageTowerConfig)
    assert isinstance(text, TextTowerConfig)
    assert vision.with_image_size(vision.image_size * 2).image_size == vision.image_size * 2
    assert vision.with_max_patches(vision.max_patches) == vision
    assert vision.with_patch_dropout(0.0) == vision
    assert vision.is_naflex == (vision.max_patches is not None)
    assert vision.num_patches >= 0
    assert vision.pooled_width(8) > 0
    assert vision.summary
    assert vision.operations(model.embed_dim).macs > 0
    assert text.operations(model.embed_dim, text.context_length).macs > 0
    assert (vision.caption_tokens() > 0) == vision.has_tokens
    for tower in (vision, text):
        if tower.attention_tokens is not None:
            assert tower.attention_tokens > 0
            assert tower.num_heads * tower.head_width > 1
    assert set(parts_of([vision, text])) >= set(parts_of())


def test_features_for_a_probe_have_the_width_that_the_tower_says(model):
    params = unflatten({path: box.value for path, box in parameters(model).items()})
    vision, width, visual = model.vision.unprojected(model.embed_dim, params["visual"])
    config = replace(model, embed_dim=width, vision=vision)
    images = as_floats(vision.image_spec.shapes(2))
    features = jax.eval_shape(CLIP(config).encode_image, params | {"visual": visual}, images)
    assert features.shape == (2, width)


def as_floats(images: Any) -> Any:
    """The shapes of normalised images."""
    if hasattr(images, "pixels"):
        return replace(images, pixels=as_floats(images.pixels))
    return jax.ShapeDtypeStruct(images.shape, jnp.float32)


# ------------------------------------------------------------------ a new tower


@pytest.fixture(scope="module")
def mixer() -> Weights:
    return Weights(config=MIXER, params=conftest.parameters(MIXER))


def test_a_new_tower_is_sharded_and_counted(mixer):
    shardings = sharding.param_shardings(MIXER, mixer.params, make_mesh(MESHES["2x2x2"]))
    kernel = shardings["visual"]["channels_0"]["c_fc"]["kernel"]
    assert kernel.spec == jax.sharding.PartitionSpec("fsdp", "tensor")
    macs = MIXER.vision.operations(MIXER.embed_dim).macs
    assert flops.forward(MIXER).image == 2 * macs
    assert flops.training(MIXER, 8).image == 8 * 3 * 2 * macs


def test_a_new_tower_has_a_name_in_tables():
    assert zoo.name_of(MIXER) == "Mixer-text-w32d2"
    assert zoo.name_of(replace(RESNET, text=MIXER.text)) == "RN-w8-text-w32d2"


def test_a_new_tower_has_layers_and_adapters(mixer):
    updates = jax.tree.map(np.ones_like, mixer.params)
    rows = MIXER.dimensions()
    scaled, _ = scale_layers(0.5, rows, MIXER.layers_from).update(updates, optax.EmptyState())
    visual = scaled["visual"]
    assert visual["stem"]["kernel"].max() == 0.5**3
    assert visual["tokens_0"]["c_fc"]["kernel"].max() == 0.5**2
    assert visual["channels_1"]["c_proj"]["bias"].max() == 0.5
    assert visual["projection"].max() == 1
    adapters = lora.adapted(MIXER, lora.LoRAConfig(targets=("visual/*",)))
    assert {each.kernel.split("/")[1] for each in adapters} == {
        "stem",
        "tokens_0",
        "channels_0",
        "tokens_1",
        "channels_1",
    }


def test_a_new_tower_takes_another_size(mixer):
    larger = with_input(mixer, image_size=48)
    vision = larger.config.vision
    assert larger.preprocess.image_size == vision.image_size == 48
    shapes = {path: box.value.shape for path, box in parameters(larger.config).items()}
    assert {path: x.shape for path, x in flatten(larger.params).items()} == shapes
    images = jnp.ones((2, 48, 48, 3), jnp.float32)
    features = jax.jit(CLIP(larger.config).encode_image)(larger.params, images)
    assert features.shape == (2, MIXER.embed_dim)
    assert np.isfinite(features).all()


def test_what_a_new_tower_does_not_answer_is_an_error(mixer):
    config = replace(MIXER, vision=BareConfig())
    weights = replace(mixer, config=config)
    with pytest.raises(
        InputError, match=r"image_size=48.*visual/tokens_0/c_fc/bias.*BareConfig\.fit"
    ):
        with_input(weights, image_size=48)
    with pytest.raises(InputError, match=r"tokens=9 needs a ViT.*has a Bare, for 32 pixels"):
        with_input(weights, tokens=9)
    with pytest.raises(InputError, match=r"layer_decay=1, or define BareConfig\.first_layers"):
        config.layers_from("visual/stem/kernel")
    with pytest.raises(InputError, match=r"--format stablehlo, or define BareConfig\.onnx"):
        config.vision.onnx(None, "pixels")


def test_the_parts_of_a_step_are_those_of_layers_and_towers():
    parts = parts_of([MIXER.vision, RESNET.vision, TINY.text])
    assert [*parts] == ["norms", "projections", "MLP", "attention", "token MLP", "convolutions"]
    assert math.prod(len(pattern) for pattern in parts.values())
