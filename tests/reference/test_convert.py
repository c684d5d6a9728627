"""The same numbers as openai-clip, open_clip and transformers, from their files and back: small
models with every option. `benchmarks/published.py` compares those of the published sizes."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPModel, CLIPProcessor

from clip_jax.convert import openai
from clip_jax.convert.conversion import ConvertConfig, convert
from clip_jax.convert.formats import read_weights, verify, write_weights
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.verify import random_inputs, relative_difference
from clip_jax.convert.weights import with_input
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from tests.reference.parity import (
    TEXTS,
    check_parity,
    lively,
    loaded,
    random_weights,
    read_back,
    texts_for,
)

# open_clip's settings of small models, with every option that we have.
VISION = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
RESNET = {"layers": [1, 2, 1, 1], "width": 16, "patch_size": None}
OPEN_CLIP = {
    "quickgelu": ({"quick_gelu": True}, {}, {}),
    "mean pooling, no ln_pre, layer scale; context of 77, not causal, last token": (
        {},
        {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "ls_init_value": 0.1},
        {"context_length": 77, "no_causal_mask": True, "pool_type": "last"},
    ),
    "sigmoid, gelu tanh, heads of 32, wide MLP; end of text by id": (
        {"init_logit_bias": -10.0},
        {"act_kwargs": {"approximate": "tanh"}, "head_width": 32, "mlp_ratio": 4.3637},
        {
            "heads": 2,
            "pool_type": "eos",
            "eos_id": 49407,
            "proj_bias": True,
            "norm_kwargs": {"eps": 1e-6},
        },
    ),
    "gelu, custom text": ({"custom_text": True}, {}, {}),
    "resnet": ({}, RESNET, {}),
    "resnet, quickgelu": ({"quick_gelu": True}, RESNET, {}),
}
HUGGING_FACE = {
    "legacy eos": ({}, {"eos_token_id": 2}),
    "one gelu, new eos": ({"hidden_act": "gelu", "layer_norm_eps": 1e-6}, {"eos_token_id": 49407}),
    "gelu, odd MLP, eos below others": (
        {"hidden_act": "gelu", "intermediate_size": 201},
        {
            "hidden_act": "gelu",
            "intermediate_size": 77,
            "num_attention_heads": 4,
            "eos_token_id": 49407,
            "vocab_size": 49410,
        },
    ),
}
OPENAI = {
    "vit": (48, 64, 2, 128, 16, 20, 49408, 64, 1, 2),
    "resnet": (48, 64, (1, 2, 1, 1), 16, None, 20, 49408, 64, 1, 2),
}


# ------------------------------------------------------------------ theirs, small, every option


def open_clip_model(open_clip, tmp_path, top, vision, text):
    torch.manual_seed(0)
    config = {"embed_dim": 48, "vision_cfg": VISION | vision, "text_cfg": TEXT | text, **top}
    kind = open_clip.CustomTextCLIP if top.get("custom_text") else open_clip.CLIP
    arguments = {name: x for name, x in config.items() if name != "custom_text"}
    model = lively(kind(**arguments))
    tmp_path.mkdir(exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": {"interpolation": "bilinear"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    return model


def save_open_clip(model, folder, dtype="float32"):
    state = model.state_dict()
    if dtype == "float16":
        state = {n: x.half() if x.is_floating_point() else x for n, x in state.items()}
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    original = read_tensors(folder / "open_clip_pytorch_model.bin")
    return {name.removeprefix("text."): x for name, x in original.items()}


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_open_clip(open_clip, tmp_path, name):
    model = open_clip_model(open_clip, tmp_path / "in", *OPEN_CLIP[name])
    original = save_open_clip(model, tmp_path / "in")
    weights = read_weights(tmp_path / "in")
    assert weights.preprocess.interpolation == "bilinear"

    images, _ = random_inputs(weights.config)
    ours = make_tokenizer(weights.config.text)(TEXTS, weights.config.text.context_length, True)
    tokenizer = open_clip.SimpleTokenizer(context_length=weights.config.text.context_length)
    theirs = tokenizer(TEXTS).numpy()
    check_parity(weights, model, images, ours, theirs)

    read_back(weights, tmp_path / "out", "open-clip", original)
    assert verify(weights, tmp_path / "out", "open-clip").passed
    *_, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert "bilinear" in str(preprocess.transforms[0].interpolation).lower()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    assert np.array_equal(tokenizer(TEXTS).numpy(), ours)

    half = save_open_clip(model, tmp_path / "in", "float16")
    read_back(read_weights(tmp_path / "in"), tmp_path / "half", "open-clip", half)


def hugging_face_model(vision, text):
    torch.manual_seed(0)
    config = TheirConfig(
        vision_config={
            "image_size": 64,
            "patch_size": 16,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            **vision,
        },
        text_config={
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "max_position_embeddings": 20,
            **text,
        },
        projection_dim=48,
    )
    return CLIPModel(config).eval()


def save_hugging_face(model, folder, **options):
    model.save_pretrained(folder, **options)
    original = {}
    for path in folder.glob("*.safetensors"):
        original |= read_tensors(path)
    return original


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(tmp_path, name):
    """From shards of float32, and from one file of float16."""
    model = hugging_face_model(*HUGGING_FACE[name])
    original = save_hugging_face(model, tmp_path / "in", max_shard_size="5MB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    weights = read_weights(tmp_path / "in")
    assert weights.config.text.pool == ("eos" if "below" in name else "argmax")

    read_back(weights, tmp_path / "out", "hugging-face", original)
    assert verify(weights, tmp_path / "out", "hugging-face").passed
    processor = CLIPProcessor.from_pretrained(tmp_path / "out", local_files_only=True)
    texts = texts_for("hugging-face")
    ours = make_tokenizer(weights.config.text)(texts, 20, True)
    theirs = processor(text=texts, padding="max_length", truncation=True, return_tensors="np")
    images = random_inputs(weights.config)[0][: len(texts)]
    check_parity(weights, model, images, ours, theirs["input_ids"])
    padded = processor(text=texts, padding=True, return_tensors="np")["input_ids"]
    assert padded.shape[1] < 20
    original = save_hugging_face(model.half(), tmp_path / "half")
    read_back(read_weights(tmp_path / "half"), tmp_path / "again", "hugging-face", original)


@pytest.mark.parametrize(
    ("name", "dtype", "archive"),
    [
        ("vit", "float16", "zip"),
        ("vit", "float32", "zip"),
        ("resnet", "float32", "zip"),
        ("resnet", "float16", "traced"),
    ],
)
def test_openai(openai_clip, tmp_path, name, dtype, archive):
    from clip.model import CLIP as OpenAI
    from clip.model import convert_weights

    torch.manual_seed(0)
    model = lively(OpenAI(*OPENAI[name]))
    if dtype == "float16":
        convert_weights(model)
    sizes = dict(zip(openai.SIZES, (OPENAI[name][1], 20, 49408), strict=True))
    state = model.state_dict() | {n: torch.tensor(x) for n, x in sizes.items()}
    path = tmp_path / "in.pt"
    if archive == "traced":
        traced(model).save(str(path))
    else:
        torch.save(state, path)
    original = {n: x for n, x in read_tensors(path).items() if not n.endswith("attn_mask")}
    assert original.keys() == state.keys()
    weights = read_weights(path)
    model = model.float()

    images, _ = random_inputs(weights.config)
    ours = make_tokenizer(weights.config.text)(TEXTS, 20, True)
    theirs = openai_clip.tokenize(TEXTS, 20, truncate=True).numpy()
    check_parity(weights, model, images, ours, theirs)
    read_back(weights, tmp_path / "archive.pt", "openai", original)
    verification = verify(weights, tmp_path / "archive.pt", "openai")
    assert verification.passed
    assert verification.rounding_loss is not None
    least, most = (0, 0) if dtype == "float16" else (1e-5, 1e-2)
    assert least <= verification.rounding_loss <= most


def traced(model):
    """An archive as the released ones are: the model traced, its sizes as buffers."""
    for name, size in zip(openai.SIZES, (model.visual.input_resolution, 20, 49408), strict=True):
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(size))
    kind = next(model.visual.parameters()).dtype
    example = {
        "encode_image": torch.zeros(1, 3, 64, 64, dtype=kind),
        "encode_text": torch.ones(1, 20, dtype=torch.long),
    }
    return torch.jit.trace_module(model, example)


# ------------------------------------------------------------------ ours, to every format


def small(name: str) -> CLIPConfig:
    """A published architecture, narrow and with two layers."""
    config = zoo.get(name)
    if isinstance(config.vision, ResNetConfig):
        vision = replace(config.vision, image_size=64, layers=(1, 2, 1, 1), width=16, num_heads=8)
    else:
        vision = replace(
            config.vision, image_size=64, patch_size=16, width=128, depth=2, num_heads=2
        )
    # A smaller vocabulary where that can be written.
    sizes = {"context_length": 20, "vocab_size": 900 if config.text.causal else 49_408}
    text = replace(config.text, width=64, depth=2, num_heads=1, **sizes)
    return replace(config, embed_dim=48, vision=vision, text=text)


@pytest.mark.parametrize(
    ("name", "to", "options"),
    [
        ("ViT-B/32", "openai", {}),
        ("RN50", "openai", {"dtype": "float16"}),
        ("ViT-B/32", "hugging-face", {"dtype": "float16"}),
        ("RN50", "open-clip", {"dtype": "float16"}),
        ("ViT-B-32", "open-clip", {}),
        ("ViT-L-14-CLIPA", "open-clip", {}),
    ],
)
def test_ours(openai_clip, open_clip, tmp_path, name, to, options):
    """And other weights are told from them."""
    weights = random_weights(small(name))
    write_weights(weights, tmp_path / "out", to, **options)
    # openai-clip has one vocabulary, larger than this model's.
    differing = ("token ids",) if to == "openai" else ()
    assert verify(weights, tmp_path / "out", to, **options).differing == differing
    params = jax.tree.map(lambda x: np.asarray(1.01 * x), weights.params)
    others = replace(weights, params=params)
    assert "image tower" in verify(others, tmp_path / "out", to, **options).differing
    model, tokenize = loaded(to, tmp_path / "out")
    ours = make_tokenizer(weights.config.text)(texts_for(to), 20, True)
    theirs = ours if to == "openai" else tokenize(texts_for(to)).numpy()
    check_parity(weights, model.float(), random_inputs(weights.config)[0], ours, theirs)
    again = read_weights(tmp_path / "out")
    assert again.config == replace(
        weights.config,
        init_logit_scale=again.config.init_logit_scale,
        text=replace(weights.config.text, eos_token_id=again.config.text.eos_token_id),
    )
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)


@pytest.mark.parametrize("to", ["hugging-face", "open-clip"])
def test_the_bundled_model(open_clip, tmp_path, to):
    settings = ConvertConfig(source=Path("icons"), destination=tmp_path / "out", to=to, verify=True)
    verification = convert(settings).verification
    assert verification.passed
    (other,) = [made for made in verification.made if made.reference != "clip_jax"]
    assert other.texts_with_other_ids == 0
    assert (tmp_path / "out/training.json").is_file()  # of the card


def test_bfloat16_comes_back_from_openais_format(tmp_path):
    """tests/convert/test_formats.py has the formats that need no torch to write."""
    weights = random_weights(small("ViT-B/32"))
    write_weights(weights, tmp_path / "x.pt", "openai", dtype="bfloat16")
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), weights.params)
    jax.tree.map(np.testing.assert_array_equal, read_weights(tmp_path / "x.pt").params, rounded)


# ------------------------------------------------------------------ positions


@pytest.mark.parametrize("size", [48, 80])
def test_positions_resize_as_open_clips(open_clip, tmp_path, size):
    from open_clip.model import resize_pos_embed

    model = open_clip_model(open_clip, tmp_path, {}, {}, {})
    save_open_clip(model, tmp_path)
    larger = open_clip_model(open_clip, tmp_path / "x", {}, {"image_size": size}, {})
    state = dict(model.state_dict())
    resize_pos_embed(state, larger)
    visual = with_input(read_weights(tmp_path), image_size=size).params["visual"]
    theirs = state["visual.positional_embedding"].numpy()
    assert relative_difference(visual["positional_embedding"], theirs) < 1e-6
