"""The published models at their sizes against the peers, both directions.

What each peer builds itself, with weights of its own, is saved by it, read here and compared;
random weights of ours are written, loaded by the peer's own loader and compared. Each comparison
also makes the mistakes that it has to notice (`check_parity`). The widest models are whole in
shapes and counts, and of full width but two layers deep where numbers are compared.

`pytest -m slow -s tests/reference/test_published.py` prints a row for each model and peer.
"""

import json
from dataclasses import replace
from math import prod

import pytest
import torch

from clip_jax.convert import hugging_face, openai
from clip_jax.convert import open_clip as open_clip_format
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.state_dict import param_shapes
from clip_jax.convert.verify import random_inputs
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.models import zoo
from clip_jax.models.resnet import ResNetConfig
from tests.reference.parity import check_parity, lively, loaded, random_weights, texts_for

OPEN_CLIP_NAMES = {  # as open_clip's own configurations are called
    "ViT-B/32": "ViT-B-32-quickgelu",
    "ViT-B/16": "ViT-B-16-quickgelu",
    "ViT-L/14": "ViT-L-14-quickgelu",
    "ViT-L/14@336px": "ViT-L-14-336-quickgelu",
    "RN50": "RN50-quickgelu",
    "RN101": "RN101-quickgelu",
    "RN50x4": "RN50x4-quickgelu",
    "RN50x16": "RN50x16-quickgelu",
    "RN50x64": "RN50x64-quickgelu",
    "ViT-H-14": "ViT-H-14",
    "ViT-g-14": "ViT-g-14",
    "ViT-bigG-14": "ViT-bigG-14",
}
CUT = ["RN50x16", "RN50x64", "ViT-H-14", "ViT-g-14", "ViT-bigG-14"]


def expressible(name, to):
    """OpenAI's code has heads of 64 channels and QuickGELU; Hugging Face's has no ResNet."""
    if to == "hugging-face":
        return not name.startswith("RN")
    return to == "open-clip" or not name.startswith(("ViT-H", "ViT-g", "ViT-big"))


CASES = [
    (name, to)
    for name in OPEN_CLIP_NAMES
    for to in ("openai", "open-clip", "hugging-face")
    if expressible(name, to)
]


def cut(config):
    """Full width, two layers (a ResNet: two blocks in each stage)."""
    resnet = isinstance(config.vision, ResNetConfig)
    depth = {"layers": (2, 2, 2, 2)} if resnet else {"depth": 2}
    return replace(
        config, vision=replace(config.vision, **depth), text=replace(config.text, depth=2)
    )


# ------------------------------------------------------------------ each peer's own model


def openai_model(config):
    from clip.model import CLIP as Peer

    vision, text = config.vision, config.text
    resnet = isinstance(vision, ResNetConfig)
    depth, patch = (vision.layers, None) if resnet else (vision.depth, vision.patch_size)
    return Peer(
        config.embed_dim, vision.image_size, depth, vision.width, patch,
        text.context_length, text.vocab_size, text.width, text.num_heads, text.depth,
    )  # fmt: skip


def open_clip_settings(name, config):
    """open_clip's own configuration; cut as deep as ours is."""
    import open_clip

    settings = open_clip.get_model_config(OPEN_CLIP_NAMES[name])
    vision = config.vision
    resnet = isinstance(vision, ResNetConfig)
    settings["vision_cfg"]["layers"] = list(vision.layers) if resnet else vision.depth
    settings["text_cfg"]["layers"] = config.text.depth
    return settings


def hugging_face_model(config):
    import transformers

    def tower(part):
        return {
            "hidden_size": part.width,
            "intermediate_size": part.mlp_width,
            "num_hidden_layers": part.depth,
            "num_attention_heads": part.num_heads,
            "hidden_act": part.activation,
        }

    vision, text = config.vision, config.text
    sizes = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=tower(vision) | sizes,
            text_config=tower(text) | {"max_position_embeddings": text.context_length},
            projection_dim=config.embed_dim,
        )
    )


def saved_by_the_peer(name, config, to, folder):
    """Build a peer's model with its own initialisation and let it save itself."""
    import open_clip

    torch.manual_seed(0)
    folder.mkdir()
    if to == "openai":
        model = lively(openai_model(config))
        sizes = (config.vision.image_size, config.text.context_length, config.text.vocab_size)
        buffers = {n: torch.tensor(x) for n, x in zip(openai.SIZES, sizes, strict=True)}
        torch.save(model.state_dict() | buffers, folder / "model.pt")
        return model, folder / "model.pt"
    if to == "open-clip":
        settings = open_clip_settings(name, config)
        model = lively(open_clip.CLIP(**settings))
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
        content = {"model_cfg": settings, "preprocess_cfg": {}}
        (folder / "open_clip_config.json").write_text(json.dumps(content))
        return model, folder
    model = hugging_face_model(config).eval()
    model.save_pretrained(folder)
    return model, folder


# ------------------------------------------------------------------ both directions


@pytest.mark.slow
@pytest.mark.parametrize(("name", "to"), CASES)
def test_published_models(openai_clip, open_clip, tmp_path, name, to):
    config = cut(zoo.get(name)) if name in CUT else zoo.get(name)
    images = random_inputs(config)[0][:2]

    weights = random_weights(config)
    ours = make_tokenizer(weights.config.text)(texts_for(to))
    write_weights(weights, tmp_path / "out", to)
    peer, tokenize = loaded(to, tmp_path / "out")
    theirs = tokenize(texts_for(to)).numpy()
    there = check_parity(weights, peer, images, ours, theirs)
    del weights, peer

    peer, path = saved_by_the_peer(name, config, to, tmp_path / "in")
    weights = read_weights(path)
    assert weights.config == config
    here = check_parity(weights, peer, images, ours, theirs)
    print(f"\n| {name} | {to} | {there:.1e} | {here:.1e} |")


# ------------------------------------------------------------------ shapes and counts, whole


def shapes_by(rows, config):
    """Their name → shape of every tensor that a conversion table makes of an architecture."""
    found = {}
    for row in rows:
        shape = param_shapes(config)[row.ours]
        for theirs in row.names:
            if "{}" in theirs:
                each = row.their_shape(shape[1:])
                found |= {theirs.format(i): each for i in range(shape[0])}
            else:
                found[theirs] = row.their_shape(shape)
    return found


@pytest.mark.parametrize(("name", "to"), CASES)
def test_whole_shapes(openai_clip, open_clip, name, to):
    """Shapes and parameter counts are those of the model that the peer builds, without memory."""
    config = zoo.get(name)
    with torch.device("meta"):
        if to == "openai":
            model, rows = openai_model(config), openai.rows(config)
        elif to == "open-clip":
            model = open_clip.CLIP(**open_clip_settings(name, config))
            rows = open_clip_format.table(config)
        else:
            model, rows = hugging_face_model(config), hugging_face.rows(config)
    state = {n: x for n, x in model.state_dict().items() if not n.endswith(openai.COUNTER)}
    expected = {n: tuple(x.shape) for n, x in state.items()}
    assert shapes_by(rows, config) == expected
    buffers = {n for n, _ in model.named_buffers()}
    assert sum(prod(s) for p, s in param_shapes(config).items() if "batch_stats" not in p) == sum(
        x.numel() for n, x in state.items() if n not in buffers
    )
