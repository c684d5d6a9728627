"""SigLIP, SigLIP 2 and MetaCLIP 2: the numbers of `SiglipModel`, of open_clip's SigLIP and of
`MetaClip2Model`, in and out, for one small model of each family of shapes."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from clip_jax.convert import big_vision, open_clip, timm
from clip_jax.convert.command import ConvertConfig, convert
from clip_jax.convert.files import read_tensors
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import param_shapes
from clip_jax.convert.verify import BOUND, random_inputs, relative_difference, verify
from clip_jax.data.images import Preprocess
from clip_jax.models import zoo
from clip_jax.models.text import TokenizerConfig
from tests.reference.parity import outputs, random_weights

# Small towers of each family: (image tower, text tower, embed_dim).
FAMILIES = {
    "base": ({}, {}, 64),
    "i18n": ({}, {"projection": False, "projection_bias": False}, 64),
    "so400m": ({"mlp_ratio": 3.7362}, {"mlp_ratio": 3.7362}, 64),  # 239, which 64 does not divide
    "g-opt": ({"width": 96, "num_heads": 2}, {}, 96),
    "unused pixels": ({"image_size": 34}, {}, 64),
}


def small(name):
    """A SigLIP of two layers, with what its family has of its own."""
    config = zoo.get("ViT-B-16-SigLIP")
    vision, text, embed_dim = FAMILIES[name]
    tower = {"image_size": 32, "patch_size": 8, "width": 64, "depth": 2, "num_heads": 4}
    words = {
        "context_length": 12,
        "vocab_size": 300,
        "width": 64,
        "depth": 2,
        "num_heads": 4,
        "tokenizer": TokenizerConfig(file="", clean="canonicalize"),
    }
    return replace(
        config,
        embed_dim=embed_dim,
        vision=replace(config.vision, **tower | vision),
        text=replace(config.text, **words | text),
    )


def siglip(name):
    config = small(name)
    preprocess = Preprocess(
        image_size=config.vision.image_size, mean=config.image_mean, std=config.image_std,
        resize_mode="squash",
    )  # fmt: skip
    weights = replace(random_weights(config), preprocess=preprocess)
    rng = np.random.default_rng(1)  # drawn, since Hugging Face starts both at 0
    scalars = {name: np.array(rng.normal(), np.float32) for name in ("logit_scale", "logit_bias")}
    return replace(weights, params=weights.params | scalars)


@pytest.fixture
def toy_trunk(monkeypatch):
    """Register the small image towers with timm, whose names alone open_clip can build."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from timm.models import register_model
        from timm.models.vision_transformer import VisionTransformer

    def register(vision, activation):
        def vit_toy_siglip(pretrained=False, **options):
            options = {name: x for name, x in options.items() if "pretrained" not in name}
            return VisionTransformer(
                img_size=vision.image_size, patch_size=vision.patch_size, embed_dim=vision.width,
                depth=vision.depth, num_heads=vision.num_heads, mlp_ratio=vision.mlp_ratio,
                class_token=False, act_layer=activation,
                **{"num_classes": 0, "global_pool": "map"} | {
                    n: x for n, x in options.items() if n in ("num_classes", "global_pool")
                },
            )  # fmt: skip

        vit_toy_siglip.__module__ = __name__
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            register_model(vit_toy_siglip)
        fixed = "gelu" if activation == "gelu" else "gelu_tanh"
        monkeypatch.setitem(timm.TRUNKS, "vit_toy_siglip", replace(vision, activation=fixed))

    return register


def read_again(weights, path, to):
    """What was written comes back with the same bits, and is written again with the same bits."""
    again = read_weights(path)
    write_weights(again, path.with_name(f"{path.name} again"), to)
    suffix = {"hugging-face": "model.safetensors", "open-clip": "open_clip_model.safetensors"}
    files = [p / suffix[to] if to in suffix else p for p in (
        path, path.with_name(f"{path.name} again"),
    )]  # fmt: skip
    first, second = map(read_tensors, files)
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name
        assert array.dtype == second[name].dtype
    return again


@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face(tmp_path, name):
    weights = siglip(name)
    write_weights(weights, tmp_path / "out", "hugging-face")
    assert verify(weights, tmp_path / "out", "hugging-face").passed
    again = read_again(weights, tmp_path / "out", "hugging-face")
    assert again.config.vision == weights.config.vision
    assert again.preprocess == weights.preprocess
    assert verify(again, tmp_path / "out", "hugging-face").passed  # an identity for no projection


def test_hugging_faces_own_folder(tmp_path):
    """Written by transformers, in its defaults where it has some."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(0)
    towers = {
        "hidden_size": 64, "intermediate_size": 200, "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }  # fmt: skip
    vision = {**towers, "image_size": 64, "num_attention_heads": 2}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=towers)).eval()
    with torch.no_grad():
        model.logit_scale.fill_(1.3)
        model.logit_bias.fill_(-2.1)
    model.save_pretrained(tmp_path / "in")
    weights = read_weights(tmp_path / "in")
    assert weights.config.text.vocab_size == 32_000
    assert weights.preprocess.resize_mode == "squash"
    assert verify(weights, tmp_path / "in", "hugging-face").passed
    read_again(weights, tmp_path / "in", "hugging-face")


def test_native_aspect_ratios_are_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2"}))
    with pytest.raises(ValueError, match="NaFlex"):
        read_weights(tmp_path)


@pytest.mark.parametrize("name", ["base", "i18n", "so400m", "g-opt"])
def test_open_clip(tmp_path, toy_trunk, name):
    weights = siglip(name)
    toy_trunk(weights.config.vision, "gelu_tanh")
    write_weights(weights, tmp_path / "out", "open-clip")
    assert verify(weights, tmp_path / "out", "open-clip").passed
    again = read_again(weights, tmp_path / "out", "open-clip")
    assert again.config == weights.config


def test_the_activation_that_a_name_fixes(tmp_path, toy_trunk):
    """Exact GELU where the model has tanh: refused, or said and measured."""
    weights = siglip("base")
    toy_trunk(weights.config.vision, "gelu")
    write_weights(weights, tmp_path / "ours", "clip-jax")
    settings = {"source": tmp_path / "ours", "destination": tmp_path / "out", "to": "open-clip"}
    with pytest.raises(ValueError, match=r"vit_toy_siglip fixes it.*--accept-activation"):
        convert(ConvertConfig(**settings))
    done = convert(ConvertConfig(**settings, accept_activation=True, verify=True))
    assert 1e-5 < done.activation_difference < 1e-2
    assert done.verification.passed  # what is written is what open_clip computes
    assert read_weights(tmp_path / "out").config.vision.activation == "gelu"
    assert open_clip.as_computed(weights).config.text.activation == "gelu_tanh"


@pytest.mark.parametrize("name", ["base", "i18n", "so400m", "g-opt"])
def test_big_vision(tmp_path, toy_trunk, name):
    weights = siglip(name)
    toy_trunk(weights.config.vision, "gelu")
    path = tmp_path / "out.npz"
    write_weights(weights, path, "big-vision")
    assert verify(weights, path, "big-vision").passed
    again = read_again(weights, path, "big-vision")
    assert again.config == weights.config


def test_big_visions_blocks_one_by_one(tmp_path):
    """As older files have them; with a file of the optimizer's, which is left."""
    weights = siglip("base")
    arrays = {}
    for name, array in big_vision.to_tensors(weights).items():
        if "/encoderblock/" not in name:
            arrays[name] = array
            continue
        for i, block in enumerate(array):
            arrays[name.replace("/encoderblock/", f"/encoderblock_{i}/")] = block
    np.savez(tmp_path / "x.npz", **arrays, **{"opt/0/count": np.int32(3)})
    again = read_weights(tmp_path / "x.npz")
    assert again.config == weights.config
    assert relative_difference(
        again.params["text"]["transformer"]["resblocks"]["attn"]["in_proj"]["kernel"],
        weights.params["text"]["transformer"]["resblocks"]["attn"]["in_proj"]["kernel"],
    ) == 0  # fmt: skip


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_metaclip_2(tmp_path, activation):
    """The end of text by its id, 2, which `CLIPModel` would read as the highest id."""
    from transformers import MetaClip2Config, MetaClip2Model

    torch.manual_seed(0)
    towers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": activation}
    model = MetaClip2Model(
        MetaClip2Config(
            vision_config={
                "image_size": 32, "patch_size": 8, "hidden_size": 64, "intermediate_size": 256,
                **towers,
            },
            text_config={
                "vocab_size": 300, "hidden_size": 64, "intermediate_size": 256,
                "max_position_embeddings": 12, "eos_token_id": 2, **towers,
            },
            projection_dim=48,
        )
    ).eval()  # fmt: skip
    model.save_pretrained(tmp_path / "in")
    weights = read_weights(tmp_path / "in")
    assert (weights.config.text.pool, weights.config.text.eos_token_id) == ("eos", 2)
    images, tokens = random_inputs(weights.config)
    theirs = outputs(model, images, tokens)
    write_weights(weights, tmp_path / "out", "hugging-face")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "metaclip_2"
    for to in ("hugging-face", "open-clip"):
        write_weights(weights, tmp_path / to, to)
        found = verify(weights, tmp_path / to, to)
        assert found.passed, found
    again = outputs(
        MetaClip2Model.from_pretrained(tmp_path / "out", local_files_only=True).eval(),
        images,
        tokens,
    )
    for key, value in theirs.items():
        assert relative_difference(again[key], value) <= BOUND


# ------------------------------------------------------------------ the released sizes


def test_metaclip_2s_sizes():
    """Of the zoo's sixteen, as many parameters as `MetaClip2Model` on the meta device."""
    from transformers import MetaClip2Config, MetaClip2Model

    names = [name for name in zoo.ARCHITECTURES if name.endswith("worldwide")]
    assert len(names) == 16
    for name in names:
        config = zoo.get(name)
        weights_config = json.loads(json.dumps(_metaclip_json(config)))
        with torch.device("meta"):
            model = MetaClip2Model(MetaClip2Config(**weights_config))
        count = sum(x.numel() for x in model.parameters())
        assert sum(int(np.prod(shape)) for shape in param_shapes(config).values()) == count, name


def _metaclip_json(config):
    from clip_jax.convert.clip_model import towers

    vision, text = towers(config)
    return {"vision_config": vision, "text_config": text, "projection_dim": config.embed_dim}


@pytest.mark.parametrize("name", [n for n in zoo.ARCHITECTURES if "SigLIP" in n])
def test_siglips_sizes_are_open_clips(open_clip, name):
    """The settings that we would write are those of open_clip's own configuration."""
    theirs = open_clip.get_model_config(name)
    if theirs is None:
        assert name == "ViT-SO400M-14-SigLIP2-384"  # which open_clip has at 378 pixels alone
        return
    config = zoo.get(name)
    vision, text = theirs["vision_cfg"], theirs["text_cfg"]
    assert vision["timm_model_name"] == timm.name_of(config.vision)
    assert theirs["embed_dim"] == config.embed_dim
    has = (text["vocab_size"], text["context_length"], text.get("width", 512))
    assert has == (config.text.vocab_size, config.text.context_length, config.text.width)
    assert (text["layers"], text["heads"]) == (config.text.depth, config.text.num_heads)
    assert int(text["width"] * text.get("mlp_ratio", 4.0)) == config.text.mlp_width
    assert text.get("proj_bias", False) == config.text.projection_bias
    assert (text.get("proj_type", "linear") == "linear") == config.text.projection


def test_timms_names_have_the_sizes_and_the_activations_that_we_say():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import timm as peer

        for name, vision in timm.TRUNKS.items():
            with torch.device("meta"):
                model = peer.create_model(name, pretrained=False, num_classes=0)
            mlp = model.blocks[0].mlp
            tanh = type(mlp.act).__name__ != "GELU" or mlp.act.approximate == "tanh"
            assert tanh == (vision.activation == "gelu_tanh"), name
            assert type(model.attn_pool.mlp.act) is type(mlp.act)
            assert model.pos_embed.shape == (1, vision.num_patches, vision.width), name
            assert (len(model.blocks), mlp.fc1.out_features) == (vision.depth, vision.mlp_width)
            assert model.blocks[0].attn.num_heads == vision.num_heads
            assert model.attn_pool.num_heads == vision.num_heads
