"""Low-rank adapters: the same model as with merged weights, the same gradients, and only these."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from clip_jax.errors import InputError
from clip_jax.models import lora
from clip_jax.models.clip import CLIP, CLIPConfig, Params
from clip_jax.models.lora import LoRAConfig
from tests.conftest import (
    CAPPA,
    MAMMUT,
    NAFLEX_COCA,
    NAFLEX_SIGLIP,
    RESNET,
    TINY,
    assert_close,
    batch,
    by_path,
    parameters,
)

ALL = LoRAConfig(rank=3, alpha=4.0, targets=("*",))
VISUAL = dataclasses.replace(ALL, targets=("visual/*",))
QV = LoRAConfig(rank=2, targets=("*/attn/q", "*/attn/v"), rank_stabilized=True)
# Each kind of tower, pool and decoder with linear maps of its own.
NAFLEX_POOL = dataclasses.replace(NAFLEX_COCA.vision, pool="map", patch_bias=True)
MODELS = {
    "CoCa": dataclasses.replace(NAFLEX_COCA, vision=NAFLEX_POOL),
    "MaMMUT": MAMMUT,
    "CapPa": CAPPA,
    "ResNet": RESNET,
}


def drawn(model: CLIPConfig, own: LoRAConfig) -> Params:
    """Adapters as after some training: A as drawn, and B not zero."""
    rng = np.random.default_rng(2)

    def moved(path: Any, x: Any) -> np.ndarray:
        is_b = path[-1].key.endswith("lora_b")
        return np.asarray(x) + is_b * rng.normal(0, 0.1, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(moved, lora.draw(model, own, jax.random.key(1)))


def wide(model: CLIPConfig) -> CLIPConfig:
    """Of the width of SigLIP B, since an embedding of more components has smaller ones."""
    return dataclasses.replace(
        model,
        embed_dim=768,
        dtype="bfloat16",
        vision=dataclasses.replace(model.vision, width=768, depth=1),
        text=dataclasses.replace(model.text, width=768, depth=1),
    )


@functools.cache
def computed(model: CLIPConfig) -> Any:
    """The function of parameters and inputs that computes a model's outputs."""
    needs = ("caption_states",) if model.decoder else ()

    @jax.jit
    def compute(params: Params, inputs: dict[str, Any]) -> dict[str, Any]:
        clip = CLIP(model)
        images = {"image": clip.normalize(inputs["image"])}
        out, _ = clip.outputs(params, images, {"text": inputs["text"]}, needs)
        return {name: x / jnp.linalg.norm(x, axis=-1, keepdims=True) for name, x in out.items()}

    return compute


def outputs(model: CLIPConfig, params: Params) -> dict[str, np.ndarray]:
    """Unit embeddings, and what a captioner's decoder is told of each token."""
    values = computed(model)(params, batch(model, 8))
    return {name: np.asarray(x, np.float32) for name, x in values.items()}


@pytest.mark.parametrize("name", MODELS)
def test_adapters_of_all_maps_give_what_merged_weights_give(name):
    model = MODELS[name]
    base, adapters = parameters(model), drawn(model, ALL)
    merged = outputs(model, lora.merge(base, adapters, model, ALL))
    adapted = outputs(model, lora.join(base, adapters, model, ALL))
    for kind, x in adapted.items():
        np.testing.assert_allclose(x, merged[kind], rtol=0, atol=1e-6, err_msg=kind)
    plain = outputs(model, base)
    assert all(np.abs(x - plain[kind]).max() > 0.01 for kind, x in merged.items())


def test_in_bfloat16_rounding_is_the_difference():
    model = wide(NAFLEX_SIGLIP)
    base, adapters = parameters(model), drawn(model, ALL)
    merged = outputs(model, lora.merge(base, adapters, model, ALL))
    for kind, x in outputs(model, lora.join(base, adapters, model, ALL)).items():
        np.testing.assert_allclose(x, merged[kind], rtol=0, atol=2e-3, err_msg=kind)


def test_gradients_are_those_through_the_merged_kernels():
    base, adapters = jax.tree.map(jnp.asarray, (parameters(TINY), drawn(TINY, VISUAL)))
    images = jnp.asarray(batch(TINY, 8)["image"], jnp.float32)

    def loss(params: Params) -> Any:
        return jnp.sum(jnp.sin(CLIP(TINY).encode_image(params, images)))

    def merged(adapters: Params) -> Any:
        flat, own = flatten_dict(base, sep="/"), flatten_dict(adapters, sep="/")
        for each in lora.adapted(TINY, VISUAL):
            a, b = (own[f"{each.prefix}lora_{name}"] for name in "ab")
            depth, parts = math.prod(each.depth), len(each.names)
            a, b = a.reshape(depth, -1, parts, 3), b.reshape(depth, parts, 3, -1)
            change = VISUAL.scale * jnp.einsum("tdsr,tsrf->tdsf", a, b, precision="highest")
            flat[each.kernel] += change.reshape(flat[each.kernel].shape)
        return loss(unflatten_dict(flat, sep="/"))

    expected = jax.jit(jax.grad(merged))(adapters)
    got = jax.jit(jax.grad(lambda x: loss(lora.join(base, x, TINY, VISUAL))))(adapters)
    assert_close(expected, got)


def test_a_part_of_a_fused_map_that_is_no_target_has_no_adapter():
    base, adapters = parameters(TINY), drawn(TINY, QV)
    path = "text/transformer/resblocks/attn/in_proj/kernel"
    flat = flatten_dict(adapters, sep="/")
    assert flat[path.replace("kernel", "lora_a")].shape == (2, 32, 2, 2)
    assert flat[path.replace("kernel", "lora_b")].shape == (2, 2, 2, 2, 16)
    assert all("in_proj" in name for name in flat)
    merged = by_path(lora.merge(base, adapters, TINY, QV))
    changed = {name for name, x in by_path(base).items() if np.any(merged[name] != x)}
    assert changed == {path, path.replace("text", "visual")}
    same = merged[path] == by_path(base)[path]
    assert same[:, :, 1].all()
    assert not same[:, :, [0, 2]].all(axis=(0, 1, 3, 4)).any()
    change = merged[path][0, :, 2] - by_path(base)[path][0, :, 2]
    a, b = (flat[path.replace("kernel", f"lora_{name}")][0] for name in "ab")
    expected = 16 / math.sqrt(2) * np.tensordot(a[:, 1], b[1], 1)
    np.testing.assert_allclose(change, expected, rtol=0, atol=1e-6)
    x, y = (outputs(TINY, f(base, adapters, TINY, QV))["text"] for f in (lora.join, lora.merge))
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def test_a_drawn_adapter_is_bounded_and_adds_nothing():
    adapters = by_path(lora.draw(NAFLEX_SIGLIP, ALL, jax.random.key(1)))
    for name, x in adapters.items():
        if name.endswith("lora_b"):
            assert not np.any(x), name
        else:
            inputs = 192 if "conv1" in name else 128 if "c_proj" in name else 32
            assert 0.8 < np.abs(x).max() * math.sqrt(inputs) <= 1, name
    base = parameters(TINY)
    joined = lora.join(base, lora.draw(TINY, ALL, jax.random.key(1)), TINY, ALL)
    jax.tree.map(np.testing.assert_array_equal, outputs(TINY, joined), outputs(TINY, base))


def test_a_target_that_matches_nothing_is_named_beside_those_that_exist():
    with pytest.raises(InputError) as error:
        lora.adapted(NAFLEX_SIGLIP, LoRAConfig(targets=("*/mlp/*", "q_proj")))
    assert str(error.value).startswith("lora.targets: 'q_proj' matches no linear map")
    assert "\n  visual/transformer/resblocks/attn/q\n" in str(error.value)
    assert "\n  visual/attn_pool/k\n" in str(error.value)
