"""SigLIP, SigLIP 2 and MetaCLIP 2: the numbers of `SiglipModel`, of open_clip's SigLIP and of
`MetaClip2Model`, in and out, for one small model of each family of shapes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MetaClip2Config, MetaClip2Model, SiglipConfig, SiglipModel

from clip_jax.convert import open_clip, timm
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, verify, write_weights
from clip_jax.convert.hugging_face import config_json
from clip_jax.convert.state_dict import param_shapes
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.verify import BOUND, relative_difference
from clip_jax.convert.weights import Weights
from clip_jax.inference.loading import Model
from clip_jax.models import zoo
from clip_jax.models.text import TokenizerConfig
from tests.convert.conftest import assert_same
from tests.reference.parity import random_weights, read_back

# Small towers of each family: (image tower, text tower, embed_dim).
FAMILIES = {
    "base": ({}, {}, 64),
    "i18n": ({}, {"projection": False, "projection_bias": False}, 64),
    "so400m": ({"mlp_ratio": 3.7362}, {"mlp_ratio": 3.7362}, 64),  # 239, which 64 does not divide
    "g-opt": ({"width": 96, "num_heads": 2}, {}, 96),
    "unused pixels": ({"image_size": 34}, {}, 64),
}


def siglip(name):
    """A SigLIP of two layers, with what its family has of its own."""
    config = zoo.get("ViT-B-16-SigLIP")
    vision, text, embed_dim = FAMILIES[name]
    sizes = {"width": 64, "depth": 2, "num_heads": 4}
    tower = {"image_size": 32, "patch_size": 8, **sizes}
    rules = TokenizerConfig(file="", clean="canonicalize")
    words = {"context_length": 12, "vocab_size": 300, "tokenizer": rules, **sizes}
    config = replace(
        config,
        embed_dim=embed_dim,
        vision=replace(config.vision, **tower | vision),
        text=replace(config.text, **words | text),
    )
    weights = random_weights(config)
    weights = replace(weights, preprocess=replace(weights.preprocess, resize_mode="squash"))
    rng = np.random.default_rng(1)  # drawn, since Hugging Face starts both at 0
    scalars = {name: np.array(rng.normal(), np.float32) for name in ("logit_scale", "logit_bias")}
    return replace(weights, params=weights.params | scalars)


@pytest.fixture
def toy_tower(monkeypatch):
    """Register the small image towers with timm, whose names alone open_clip can build."""
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    def register(vision, activation):
        def vit_toy_siglip(pretrained=False, **options):
            return VisionTransformer(
                img_size=vision.image_size,
                patch_size=vision.patch_size,
                embed_dim=vision.width,
                depth=vision.depth,
                num_heads=vision.num_heads,
                mlp_ratio=vision.mlp_ratio,
                class_token=False,
                act_layer=activation,
                num_classes=0,
                global_pool="map",
            )

        vit_toy_siglip.__module__ = __name__
        register_model(vit_toy_siglip)
        fixed = "gelu" if activation == "gelu" else "gelu_tanh"
        monkeypatch.setitem(timm.TOWERS, "vit_toy_siglip", replace(vision, activation=fixed))

    return register


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("hugging-face", "i18n"),  # an identity for no projection
        ("hugging-face", "unused pixels"),
        ("open-clip", "base"),
        ("open-clip", "so400m"),
        ("big-vision", "i18n"),
        ("big-vision", "g-opt"),
    ],
)
def test_there_and_back(tmp_path, toy_tower, to, name):
    weights, path = siglip(name), tmp_path / "out.npz"
    toy_tower(weights.config.vision, "gelu_tanh" if to == "open-clip" else "gelu")
    write_weights(weights, path, to)
    assert verify(weights, path, to).passed
    again = read_weights(path)
    assert again.config.vision == weights.config.vision
    rules = "transformers" if to == "hugging-face" else "openai"
    assert again.preprocess == replace(weights.preprocess, rules=rules)
    if to != "hugging-face":  # whose cleaning of texts and identity projection are its own
        assert_same(again, weights)


def test_hugging_faces_own_folder(tmp_path):
    """Written by transformers, in its defaults where it has some."""
    torch.manual_seed(0)
    towers = {
        "hidden_size": 64,
        "intermediate_size": 200,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
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
    config, rng = replace(weights.config, dtype="float32"), np.random.default_rng(0)
    ours = Model(config, weights.params, weights.preprocess)
    pixels = rng.standard_normal((2, 64, 64, 3), np.float32)
    ids = rng.integers(2, 32_000, (3, 64), np.int32)
    found = ours.probabilities(ours.encode_image(pixels), ours.encode_text(ids))
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids), torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    assert relative_difference(theirs.logits_per_image.sigmoid().numpy(), found) <= BOUND
    original = read_tensors(tmp_path / "in/model.safetensors")
    read_back(weights, tmp_path / "out", "hugging-face", original)


def test_the_activation_that_a_name_fixes(tmp_path, toy_tower):
    """Exact GELU where the model has tanh: refused, or said and measured."""
    weights = siglip("base")
    toy_tower(weights.config.vision, "gelu")
    write_weights(weights, tmp_path / "ours", "clip-jax")
    settings = {"source": tmp_path / "ours", "destination": tmp_path / "out", "to": "open-clip"}
    with pytest.raises(ValueError, match=r"name in timm fixes it.*--accept-activation"):
        convert(ConvertConfig(**settings))
    done = convert(ConvertConfig(**settings, accept_activation=True, verify=True))
    assert done.activation_difference is not None
    assert 1e-5 < done.activation_difference < 1e-2
    assert done.verification is not None
    assert done.verification.passed  # what is written is what open_clip computes
    assert read_weights(tmp_path / "out").config.vision.activation == "gelu"
    assert open_clip.as_computed(weights).config.text.activation == "gelu_tanh"


@pytest.mark.parametrize(
    ("activation", "to"), [("gelu", "hugging-face"), ("quick_gelu", "open-clip")]
)
def test_metaclip_2(tmp_path, activation, to):
    """The end of text by its id, 2, which `CLIPModel` would read as the highest id."""
    torch.manual_seed(0)
    towers = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": activation}
    model = MetaClip2Model(
        MetaClip2Config(
            vision_config={
                "image_size": 32,
                "patch_size": 8,
                "hidden_size": 64,
                "intermediate_size": 256,
                **towers,
            },
            text_config={
                "vocab_size": 300,
                "hidden_size": 64,
                "intermediate_size": 256,
                "max_position_embeddings": 12,
                "eos_token_id": 2,
                **towers,
            },
            projection_dim=48,
        )
    ).eval()
    model.save_pretrained(tmp_path / "in")
    weights = read_weights(tmp_path / "in")
    assert (weights.config.text.pool, weights.config.text.eos_token_id) == ("eos", 2)
    assert verify(weights, tmp_path / "in", "hugging-face").passed
    for kind in {"hugging-face", to}:
        write_weights(weights, tmp_path / kind, kind)
        assert verify(weights, tmp_path / kind, kind).passed
    content = json.loads((tmp_path / "hugging-face/config.json").read_text())
    assert content["model_type"] == "metaclip_2"


# ------------------------------------------------------------------ the released sizes


def test_metaclip_2s_sizes():
    """As many parameters as `MetaClip2Model` on the meta device."""
    names = [name for name in zoo.ARCHITECTURES if name.endswith("worldwide")]
    assert len(names) == 16
    for name in names:
        config = zoo.get(name)
        content = config_json(Weights(config=config, params={}), "float32")
        vision, text = content["vision_config"], content["text_config"]
        settings = MetaClip2Config(
            vision_config=vision, text_config=text, projection_dim=config.embed_dim
        )
        with torch.device("meta"):
            model = MetaClip2Model(settings)
        count = sum(x.numel() for x in model.parameters())
        assert sum(int(np.prod(shape)) for shape in param_shapes(config).values()) == count, name


def test_siglips_sizes_are_open_clips(open_clip):
    """The settings that we would write are those of open_clip's own configuration."""
    models = zoo.ARCHITECTURES.items()
    names = [name for name, config in models if "SigLIP" in name and config.vision.pool == "map"]
    names.remove("ViT-SO400M-14-SigLIP2-384")  # which open_clip has at 378 pixels alone
    names = [name for name in names if not name.endswith("naflex")]  # which open_clip 4 has
    for name in names:
        theirs, config = open_clip.get_model_config(name), zoo.get(name)
        text, ours = theirs["text_cfg"], config.text
        assert theirs["vision_cfg"]["timm_model_name"] == timm.name_of(config.vision)
        assert (theirs["embed_dim"], text.get("width", 512)) == (config.embed_dim, ours.width)
        assert (text["vocab_size"], text["context_length"]) == (
            ours.vocab_size,
            ours.context_length,
        )
        assert (text["layers"], text["heads"]) == (ours.depth, ours.num_heads)
        assert int(text["width"] * text.get("mlp_ratio", 4.0)) == ours.mlp_width
        assert text.get("proj_bias", False) == ours.projection_bias
        assert (text.get("proj_type", "linear") == "linear") == ours.projection


def test_timms_names_have_the_sizes_and_the_activations_that_we_say():
    import timm as reference

    towers = {name: x for name, x in timm.TOWERS.items() if "siglip" in name}
    assert len(towers) > 15
    for name, vision in towers.items():
        with torch.device("meta"):
            model = reference.create_model(name, pretrained=False, num_classes=0)
        mlp = model.blocks[0].mlp
        tanh = type(mlp.act).__name__ != "GELU" or mlp.act.approximate == "tanh"
        assert tanh == (vision.activation == "gelu_tanh"), name
        assert type(model.attn_pool.mlp.act) is type(mlp.act)
        if vision.max_patches is None:
            assert model.pos_embed.shape == (1, vision.num_patches, vision.width), name
        else:
            table = model.embeds.pos_embed.shape
            assert table == (1, vision.grid, vision.grid, vision.width), name
            assert model.embeds.proj.in_features == 3 * vision.patch_size**2
            assert model.embeds.pos_embed_interp_mode == "bilinear"
        assert (len(model.blocks), mlp.fc1.out_features) == (vision.depth, vision.mlp_width)
        assert model.blocks[0].attn.num_heads == vision.num_heads
        assert model.attn_pool.num_heads == vision.num_heads
