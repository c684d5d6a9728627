"""The towers: counts against the published tables, causality, pooling, remat, a golden tree."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clip_jax.models import zoo
from clip_jax.models.clip import CLIP, CLIPConfig, Params, count
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig

HERE = Path(__file__).parent
TINY = CLIPConfig(
    embed_dim=16,
    vision=ViTConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2),
    text=TextConfig(vocab_size=520, context_length=10, width=32, depth=2, num_heads=2),
    dtype="float32",
)


def vision(**options) -> CLIPConfig:
    return dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, **options))


def init(config: CLIPConfig) -> tuple[CLIP, Params]:
    model = CLIP(config)
    return model, jax.jit(model.init)(jax.random.key(0))


def image_grads(config: CLIPConfig) -> Params:
    """Gradients of some function of the image features, by every parameter of the image tower."""
    model = CLIP(config)
    size = config.vision.image_size

    @jax.jit
    def grads(key):
        images = jax.random.normal(key, (2, size, size, 3))
        return jax.grad(lambda p: (model.encode_image(p, images) ** 2).sum())(model.init(key))

    return grads(jax.random.key(0))["visual"]


def published_counts() -> dict[str, tuple[float, float, float]]:
    """Millions of parameters: whole, image tower, the rest."""
    with (HERE / "published_parameters.csv").open() as file:
        return {
            row["model"]: tuple(float(row[f"{part}mparams"]) for part in ("", "image_", "text_"))
            for row in csv.DictReader(file)
        }


@pytest.mark.parametrize("name", published_counts())
def test_parameter_counts_are_the_published_ones(name):
    params = jax.eval_shape(CLIP(zoo.get(name)).init, jax.random.key(0))
    whole, image = count(params) / 1e6, count(params["visual"]) / 1e6
    # The tables print 0.01 M.
    np.testing.assert_allclose(
        (whole, image, whole - image), published_counts()[name], rtol=0, atol=0.005001
    )


def test_every_vision_transformer_of_the_zoo_has_a_published_count_or_a_sibling():
    unlisted = {n for n in zoo.ARCHITECTURES if n.startswith("ViT")} - published_counts().keys()
    assert unlisted == {"ViT-L-14-336-quickgelu", "ViT-H-14-336", "ViT-g-14-336", "ViT-bigG-14-336"}


def test_an_unknown_architecture_names_its_neighbours():
    with pytest.raises(KeyError, match="ViT-B-32"):
        zoo.get("ViT-B32")


def parameter_tree() -> dict[str, list[int]]:
    params = jax.eval_shape(CLIP(TINY).init, jax.random.key(0))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): list(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


def test_the_tree_of_parameters_is_the_public_format():
    assert parameter_tree() == json.loads((HERE.parent / "golden/parameter_tree.json").read_text())


def test_text_is_causal():
    model, params = init(TINY)
    tokens = jnp.array([[518, 5, 6, 519, 0, 0, 0, 0, 0, 0]])

    @jax.jit
    @jax.grad
    def by_position(embedding):
        text = params["text"] | {"positional_embedding": embedding}
        return model.encode_text(params | {"text": text}, tokens).sum()

    # End of text stands at position 3: what comes after has no influence, all before has.
    moved = np.abs(by_position(params["text"]["positional_embedding"])).max(axis=1) > 0
    assert moved.tolist() == [True] * 4 + [False] * 6


def test_without_causality_every_token_counts():
    text = dataclasses.replace(TINY.text, causal=False, pool="last")
    model, params = init(dataclasses.replace(TINY, text=text))
    tokens = jnp.stack([jnp.arange(10), jnp.arange(10).at[0].set(99)])
    features = jax.jit(model.encode_text)(params, tokens)
    assert np.abs(features[0] - features[1]).max() > 0


@pytest.mark.parametrize(
    "config",
    [
        vision(pool="mean", pre_norm=False),
        vision(pool="map", class_token=False, pre_norm=False, patch_bias=True),
        vision(layer_scale=0.1, activation="gelu", mlp_ratio=3.5),
        vision(image_size=18),
    ],
    ids=["mean", "map", "layer_scale", "cropped"],
)
def test_options_run_and_reach_every_parameter(config):
    for path, grad in jax.tree_util.tree_leaves_with_path(image_grads(config)):
        assert np.abs(grad).max() > 0, path


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing(remat):
    plain, again = image_grads(TINY), image_grads(dataclasses.replace(TINY, remat=remat))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, again)


def test_bfloat16_computes_close_to_float32_and_keeps_float32_parameters():
    model16, params = init(dataclasses.replace(TINY, dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    exact = jax.jit(CLIP(TINY).encode_image)(params, images)
    rounded = jax.jit(model16.encode_image)(params, images)
    assert rounded.dtype == jnp.float32
    difference = np.linalg.norm(exact - rounded) / np.linalg.norm(exact)
    assert 1e-6 < difference < 2e-2


def test_initialisation_has_the_papers_scales():
    config = dataclasses.replace(
        TINY,
        vision=ViTConfig(image_size=32, patch_size=8, width=128, depth=4, num_heads=2),
        text=TextConfig(vocab_size=2000, width=128, depth=4, num_heads=2),
    )
    _, params = init(config)
    text, visual = params["text"], params["visual"]
    block, image_block = text["transformer"]["resblocks"], visual["transformer"]["resblocks"]
    width, depth = 128, 4
    expected = {
        "token": (text["token_embedding"], 0.02),
        "positions": (text["positional_embedding"], 0.01),
        "in_proj": (block["attn"]["in_proj"]["kernel"], width**-0.5),
        "out_proj": (block["attn"]["out_proj"]["kernel"], width**-0.5 * (2 * depth) ** -0.5),
        "c_fc": (block["mlp"]["c_fc"]["kernel"], (2 * width) ** -0.5),
        "c_proj": (block["mlp"]["c_proj"]["kernel"], width**-0.5 * (2 * depth) ** -0.5),
        "text_projection": (text["text_projection"], width**-0.5),
        "proj": (visual["proj"], width**-0.5),
        # A uniform on ±a has standard deviation a/√3.
        "conv1": (visual["conv1"]["kernel"], (3 * 64) ** -0.5 / 3**0.5),
        "image in_proj": (image_block["attn"]["in_proj"]["kernel"], (6 / 512 / 3) ** 0.5),
        "image c_proj": (image_block["mlp"]["c_proj"]["kernel"], 512**-0.5 / 3**0.5),
    }
    for name, (x, deviation) in expected.items():
        assert np.std(x) == pytest.approx(deviation, rel=0.05), name
    assert float(jnp.exp(params["logit_scale"])) == pytest.approx(1 / 0.07)
    assert not np.any(block["attn"]["in_proj"]["bias"])


def test_wrong_shapes_are_named():
    model, params = init(TINY)
    with pytest.raises(ValueError, match=r"vision.image_size=16"):
        model.encode_image(params, jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match=r"text.context_length=10"):
        model.encode_text(params, jnp.zeros((1, 11), jnp.int32))
    with pytest.raises(ValueError, match=r"vision.num_heads=5"):
        ViTConfig(num_heads=5)
