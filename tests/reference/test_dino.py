"""DINOv2 and DINOv3: the numbers of transformers and of timm, in and out, for small towers."""

import copy
import json
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import transformers

from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, verify, write_weights
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.timm import ALONE as towers_alone
from clip_jax.convert.timm import TOWERS as towers_by_name
from clip_jax.convert.verify import random_inputs, relative_difference
from clip_jax.convert.weights import with_input
from clip_jax.errors import InputError
from clip_jax.models.clip import Towers, l2_normalize
from tests.reference.parity import read_back

SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 70,
    "patch_size": 14,
}
GATED = {"use_gated_mlp": True, "hidden_act": "silu", "intermediate_size": 96}
TOWERS = {
    "dinov2": ("Dinov2", {}),
    "dinov2 swiglu": ("Dinov2", {"use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegisters", {"num_register_tokens": 2}),
    "registers swiglu": ("Dinov2WithRegisters", {"use_swiglu_ffn": True, "qkv_bias": False}),
    "dinov3": ("DINOv3ViT", {"num_register_tokens": 4, "intermediate_size": 96}),
    "dinov3 swiglu": ("DINOv3ViT", {"query_bias": False, "value_bias": False, **GATED}),
    "dinov3 keys": ("DINOv3ViT", {"key_bias": True, "num_register_tokens": 1}),
}


def drawn(model):
    """The model with random parameters, of which none is at rest but the mask token."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "mask_token" in name:
                x.zero_()
            elif "token" in name or "pos" in name:
                x.normal_(0, 0.3)
            elif x.ndim < 2:
                x.normal_(float(name.endswith(("weight", "lambda1", "gamma", "_1", "_2"))), 0.1)
            else:
                x.normal_(0, x[0].numel() ** -0.5)
    return model.eval()


def hugging_faces(name):
    kind, options = TOWERS[name]
    settings = getattr(transformers, f"{kind}Config")(**SIZES, **options)
    return drawn(getattr(transformers, f"{kind}Model")(settings))


def ours(weights, images):
    """The unit embeddings, the states after each block, and those after the norm."""
    params = {"logit_scale": np.zeros(()), **weights.params}
    params = jax.tree.map(lambda x: np.asarray(x, np.float32), params)

    def compute(towers):
        last, every = towers.visual.tokens(images, collect=True)
        embeddings = towers.visual.pool_and_tokens(last)[0]
        return [l2_normalize(embeddings), *every, towers.visual.ln_post(last)]

    towers = Towers(replace(weights.config, dtype="float32"))
    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda x: towers.apply({"params": x}, compute, method="run"))(params)
    return [np.asarray(x) for x in out]


def assert_close(weights, images, theirs):
    theirs = [x.detach().numpy() for x in theirs]
    theirs[0] = l2_normalize(theirs[0])
    for mine, x in zip(ours(weights, images), theirs, strict=True):
        assert mine.shape == x.shape
        assert relative_difference(mine, x) < 1e-5


def same_bits(before, after):
    before, after = (read_tensors(folder / "model.safetensors") for folder in (before, after))
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert after[name].dtype == x.dtype
        assert after[name].tobytes() == x.tobytes(), name


@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_transformers(tmp_path, name):
    """At the resolution of the positions, above and below it; the embedding is the pooled output,
    the class token after the norm."""
    model = hugging_faces(name)
    model.save_pretrained(tmp_path / "in")
    weights = read_weights(tmp_path / "in", one_tower=True)
    assert weights.only_tower == "image"
    for size in (70, 98, 42):
        resized = with_input(weights, image_size=size)
        images, _ = random_inputs(resized.config)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        with torch.no_grad():
            out = model(pixels, output_hidden_states=True)
        theirs = [out.pooler_output, *out.hidden_states[1:], out.last_hidden_state]
        assert_close(resized, images, theirs)
    write_weights(weights, tmp_path / "out", "hugging-face")
    same_bits(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("name", ["registers swiglu", "dinov3 swiglu"])
def test_converted_by_the_command(tmp_path, name):
    """Float16 with a processor; the folder that we write is verified, too."""
    processor = {
        "Dinov2WithRegisters": "BitImageProcessorPil",
        "DINOv3ViT": "DINOv3ViTImageProcessor",
    }
    hugging_faces(name).half().save_pretrained(tmp_path / "in")
    size = {"height": 70, "width": 70}
    kind = getattr(transformers, processor[TOWERS[name][0]])
    size = (
        {"size": {"shortest_edge": 70}, "crop_size": size}
        if "Bit" in kind.__name__
        else {"size": size}
    )
    kind(**size).save_pretrained(tmp_path / "in")
    done = convert(
        ConvertConfig(
            source=tmp_path / "in", destination=tmp_path / "out", to="hugging-face", verify=True
        )
    )
    assert done.verification.passed
    assert {x.model for x in done.verification.made} == {"source", "result"}
    same_bits(tmp_path / "in", tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert f"transformers.{TOWERS[name][0]}Model.from_pretrained" in card


# ------------------------------------------------------------------ timm

TIMMS = {
    "vit_small_patch14_dinov2": {},
    "vit_giant_patch14_dinov2": {"mlp_ratio": 4},
    "vit_small_patch14_reg4_dinov2": {"reg_tokens": 2},
    "vit_giant_patch14_reg4_dinov2": {"mlp_ratio": 4},
    "vit_small_patch16_dinov3": {"patch_size": 14},
    "vit_base_patch16_dinov3_qkvb": {"patch_size": 14, "num_reg_tokens": 0},
    "vit_small_plus_patch16_dinov3_qkvb": {"patch_size": 14, "mlp_ratio": 2},
}


def timms(name, folder, dtype=torch.float32):
    """A small tower of timm, in a folder of timm's."""
    sizes = {"img_size": 70, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    options = sizes | TIMMS[name] | {"global_pool": "token"}
    model = drawn(timm.create_model(name, pretrained=False, **options)).to(dtype)
    pixels = {"input_size": (3, 70, 70)}
    timm.models.save_for_hf(model, folder, None, options, True, data_config=pixels)
    return model.float()


@pytest.mark.parametrize("name", TIMMS)
def test_towers_of_timm(tmp_path, name):
    original = timms(name, tmp_path / "in")
    weights = read_weights(tmp_path / "in", one_tower=True)
    assert (weights.format, weights.only_tower) == ("timm", "image")
    for size in (70, 98, 42)[: 3 if "dinov2" in name else 2]:
        resized = with_input(weights, image_size=size)
        images, _ = random_inputs(resized.config)
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        model = copy.deepcopy(original)
        model.set_input_size(img_size=(size, size))
        with torch.no_grad():
            options = {
                "return_prefix_tokens": True,
                "output_fmt": "NLC",
                "intermediates_only": True,
            }
            parts = model.forward_intermediates(pixels, **options)
            states = [torch.cat([prefix, patches], 1) for patches, prefix in parts]
            theirs = [model(pixels), *states, model.forward_features(pixels)]
        assert_close(resized, images, theirs)


@pytest.mark.parametrize("name", TIMMS)
def test_folders_of_timm_there_and_back(tmp_path, name):
    """Float16; timm loads both folders, and prepares the same pixels."""
    timms(name, tmp_path / "in", torch.float16)
    config = ConvertConfig(
        source=tmp_path / "in", destination=tmp_path / "out", to="timm", verify=True
    )
    done = convert(config)
    assert done.verification.passed
    assert {x.model for x in done.verification.made} == {"source", "result"}
    same_bits(tmp_path / "in", tmp_path / "out")


def test_a_tower_of_siglip_alone(tmp_path, monkeypatch):
    """As released by timm, with its activation; it is read to start the image side."""
    name = "vit_base_patch16_siglip_224"
    small = replace(towers_alone[name], image_size=48, width=48, depth=2, num_heads=3)
    monkeypatch.setitem(towers_alone, name, small)
    sizes = {"img_size": 48, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    model = drawn(timm.create_model(name, pretrained=False, **sizes))
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    content = {
        "architecture": f"{name}.webli",
        "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_mode": "squash"},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    weights = read_weights(tmp_path, one_tower=True)
    assert (weights.config.vision, weights.config.embed_dim) == (small, 48)
    assert weights.config.image_mean == (0.5,) * 3
    images, _ = random_inputs(weights.config)
    with torch.no_grad():
        theirs = model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()
    assert relative_difference(ours(weights, images)[0], l2_normalize(theirs)) < 1e-5
    with pytest.raises(InputError, match=r"vision=ViTConfig \(needs DinoConfig\)"):
        write_weights(weights, tmp_path / "out", "timm")


def test_from_timm_to_transformers_and_back(tmp_path):
    """With registers, timm has the class token's position in the token."""
    timms("vit_giant_patch14_reg4_dinov2", tmp_path / "a", torch.float16)
    for source, to in (("a", "hugging-face"), ("b", "timm")):
        destination = tmp_path / chr(ord(source) + 1)
        convert(ConvertConfig(source=tmp_path / source, destination=destination, to=to))
    same_bits(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("name", ["vit_base_patch16_dinov3", "vit_small_plus_patch16_dinov3_qkvb"])
def test_models_of_open_clip_with_such_a_tower(tmp_path, open_clip, monkeypatch, name):
    """Both towers, the image tower by timm's name, at another size than timm's."""
    small = replace(towers_by_name[name], width=48, depth=2, num_heads=3)
    monkeypatch.setitem(towers_by_name, name, small)
    create = open_clip.timm_model.timm.create_model
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3}

    def create_model(name, **options):
        return create(name, **sizes, **options)

    monkeypatch.setattr(open_clip.timm_model.timm, "create_model", create_model)
    vision = {"timm_model_name": name, "timm_model_pretrained": False, "image_size": 48}
    content = {
        "embed_dim": 48,
        "vision_cfg": {**vision, "timm_pool": "token", "timm_proj": "none"},
        "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 2},
    }
    model = drawn(open_clip.CustomTextCLIP(**content)).half()
    folder = tmp_path / "in"
    folder.mkdir()
    file = folder / "open_clip_model.safetensors"
    state = model.state_dict()
    safetensors.torch.save_file({x: y.contiguous() for x, y in state.items()}, file)
    content |= {"custom_text": True}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": content}))
    weights = read_weights(folder)
    assert weights.config.vision == replace(small, image_size=48)
    assert verify(weights, folder, "open-clip").passed
    read_back(weights, tmp_path / "out", "open-clip", read_tensors(file))
    assert verify(weights, tmp_path / "out", "open-clip").passed


def test_timms_names_have_the_sizes_that_we_say():
    from clip_jax.convert.timm import DINO
    from clip_jax.models.clip import CLIP, CLIPConfig, count

    for name, tower in DINO.items():
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, num_classes=0)
        config = CLIPConfig(embed_dim=tower.width, vision=tower)
        params = jax.eval_shape(CLIP(config).init, jax.random.key(0))["visual"]
        class_position = tower.width * (tower.has_table and tower.registers > 0)
        expected = sum(x.numel() for x in model.parameters()) + class_position
        assert count(params) == expected, name
        assert model.blocks[0].norm1.eps == tower.norm_epsilon
        assert model.patch_embed.img_size == (tower.image_size,) * 2
