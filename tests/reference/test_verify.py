"""`convert --to clip-jax --verify`: a fault between a file and our model is found and located.

For every source format with a library: a transposed matrix of each tower, another activation,
another tokenizer, another preprocessing, another logit scale.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from clip_jax.convert import conversion
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.weights import Weights
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.lora import LoRAConfig
from clip_jax.models.text import TextConfig, TokenizerConfig
from clip_jax.models.vit import ViTConfig
from tests import vocabularies
from tests.convert.conftest import write_lora_run
from tests.reference.parity import random_weights

VISION = ViTConfig(image_size=32, patch_size=16, width=64, depth=1, num_heads=1)
TEXT = TextConfig(context_length=12, width=64, depth=1, num_heads=1)
CLIP = CLIPConfig(embed_dim=32, vision=VISION, text=TEXT)
GELU = replace(
    CLIP, vision=replace(VISION, activation="gelu"), text=replace(TEXT, activation="gelu")
)
# Of its vocabulary of 600 tokens, files of transformers and open_clip have a copy.
SHORT = replace(CLIP, text=replace(TEXT, vocab_size=600))
SIGLIP = zoo.get("ViT-B-16-SigLIP")
SIZES: dict[str, Any] = {"width": 64, "depth": 1, "num_heads": 2}


def siglip(tokenizer: TokenizerConfig, **vision: Any) -> Weights:
    """A small SigLIP with a vocabulary of 500 tokens."""
    words = {"context_length": 12, "vocab_size": 500, "tokenizer": tokenizer}
    config = replace(
        SIGLIP,
        embed_dim=64,
        vision=replace(SIGLIP.vision, image_size=32, patch_size=16, **SIZES, **vision),
        text=replace(SIGLIP.text, **words, **SIZES),
    )
    weights = random_weights(config)
    if vision:
        return weights
    return replace(weights, preprocess=replace(weights.preprocess, resize_mode="squash"))


def open_clip_checkpoint(folder: Path) -> Path:
    """A checkpoint of open_clip's training, of two processes, beside the model's settings."""
    write_weights(random_weights(GELU), folder, "open-clip")
    import safetensors.torch

    file = folder / "open_clip_model.safetensors"
    state = {f"module.{n}": x for n, x in safetensors.torch.load_file(file).items()}
    file.unlink()
    torch.save({"epoch": 1, "name": "tiny", "state_dict": state}, folder / "epoch_1.pt")
    return folder / "epoch_1.pt"


def state_dict(folder: Path) -> Path:
    """The same file without settings."""
    file = open_clip_checkpoint(folder)
    (folder / "open_clip_config.json").unlink()
    return file


def adapters(folder: Path) -> Path:
    """Adapters of PEFT beside their base."""
    write_weights(random_weights(SHORT), folder / "base", "hugging-face")
    settings = LoRAConfig(rank=2, targets=("*/attn/q", "*/mlp/*"))
    run = write_lora_run(folder / "run", folder / "base", settings)
    write_weights(read_weights(run), folder / "adapters", "peft")
    return folder / "adapters"


def written(folder: Path, name: str, weights: Weights) -> Path:
    """Weights in the format of that name."""
    path = folder / "weights"
    write_weights(weights, path, name)  # type: ignore[arg-type]
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A small model in every format, with the flags that reading it needs."""
    root = tmp_path_factory.mktemp("sources")
    folders = iter(root / str(i) for i in range(20))

    def folder() -> Path:
        path = next(folders)
        path.mkdir()
        return path

    words = str(vocabularies.byte_fallback(root / "words.json"))
    gemma = TokenizerConfig(file=words, clean="none", begin_id=2, end_id=1, pad_id=0)
    pieces = str(vocabularies.sentencepiece_model(root / "spiece.model", size=160))
    siglips = TokenizerConfig(file=pieces, clean="punctuation", end_id=1, pad_id=1)
    archive = written(folder(), "openai", random_weights(CLIP))
    naflex = siglip(gemma, max_patches=6)
    npz = written(folder(), "big-vision", siglip(TokenizerConfig(file="", clean="canonicalize")))
    return {
        "open_clip folder": (written(folder(), "open-clip", random_weights(SHORT)), {}),
        "open_clip checkpoint": (open_clip_checkpoint(folder()), {}),
        "state dict": (state_dict(folder()), {"activation": "gelu"}),
        "CLIP": (written(folder(), "hugging-face", random_weights(SHORT)), {}),
        "SigLIP": (written(folder(), "hugging-face", siglip(siglips)), {}),
        "SigLIP 2": (written(folder(), "hugging-face", siglip(gemma)), {}),
        "NaFlex": (written(folder(), "hugging-face", naflex), {}),
        "openai": (archive, {}),
        "npz": (npz, {}),
        "peft": (adapters(folder()), {}),
    }


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """Only files of published sizes are read without settings, which name their heads."""
    monkeypatch.setitem(zoo.ARCHITECTURES, "tiny", GELU)


@pytest.fixture(autouse=True)
def named_towers(monkeypatch):
    """open_clip, which also reads big_vision's files, builds image towers by timm's names."""
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    from clip_jax.convert import timm

    def vit_tiniest_siglip(pretrained=False, **options):
        sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 64, "depth": 1, "num_heads": 2}
        return VisionTransformer(
            **sizes, class_token=False, num_classes=0, global_pool="map", act_layer="gelu_tanh"
        )

    vit_tiniest_siglip.__module__ = __name__
    register_model(vit_tiniest_siglip)
    vision = replace(SIGLIP.vision, image_size=32, patch_size=16, **SIZES)
    monkeypatch.setitem(timm.TOWERS, "vit_tiniest_siglip", vision)


def verified(path, flags, to, tmp_path, fault=lambda weights: weights):
    """Convert with a fault between reading and the model; return the exit code and the report."""
    read = conversion.read_weights

    def faulty(*args: Any, **options: Any) -> Weights:
        return fault(read(*args, **options))

    config = conversion.ConvertConfig(
        source=path, destination=tmp_path / "out", to=to, verify=True, **flags
    )
    with mock.patch.object(conversion, "read_weights", autospec=True, side_effect=faulty):
        return conversion.convert(config).verification


# ------------------------------------------------------------------ faults


def transposed(tower: str):
    """The output projection of the first block's attention, transposed."""

    def change(weights: Weights) -> Weights:
        block = weights.params[tower]["transformer"]["resblocks"]
        kernel = np.array(block["attn"]["out_proj"]["kernel"])
        width = kernel.shape[-1]
        kernel[0] = kernel[0].reshape(width, width).T.reshape(kernel[0].shape)
        attention = block["attn"] | {"out_proj": block["attn"]["out_proj"] | {"kernel": kernel}}
        blocks = {"transformer": {"resblocks": block | {"attn": attention}}}
        changed = {tower: weights.params[tower] | blocks}
        return replace(weights, params=weights.params | changed)

    return change


def activated(tower: str):
    """The activation of a tower, with another one."""

    def change(weights: Weights) -> Weights:
        settings = getattr(weights.config, tower)
        other = "quick_gelu" if settings.activation != "quick_gelu" else "gelu"
        settings = replace(settings, activation=other)
        return replace(weights, config=replace(weights.config, **{tower: settings}))

    return change


def with_words(weights: Weights, tokenizer: TokenizerConfig) -> Weights:
    text = replace(weights.config.text, tokenizer=tokenizer)
    return replace(weights, config=replace(weights.config, text=text))


@pytest.fixture
def another_tokenizer(tmp_path):
    """A WordPiece in which the end of text has the highest id, as pooling in CLIP needs."""
    path = str(vocabularies.wordpiece(tmp_path / "other.json"))
    words = Tokenizer.from_file(path)
    words.add_special_tokens(["[END]"])
    words.save(path)
    end = words.token_to_id("[END]")
    tokenizer = TokenizerConfig(file=path, clean="none", begin_id=2, end_id=end, pad_id=0)
    return lambda weights: with_words(weights, tokenizer)


def reversed_mean(weights: Weights) -> Weights:
    preprocess = weights.preprocess
    mean = tuple(x + 0.01 for x in preprocess.mean)
    return replace(weights, preprocess=replace(preprocess, mean=mean))


def scaled(weights: Weights) -> Weights:
    scale = np.float32(1.001) * weights.params["logit_scale"]
    return replace(weights, params=weights.params | {"logit_scale": scale})


SOURCES = (
    "open_clip folder",
    "open_clip checkpoint",
    "state dict",
    "CLIP",
    "SigLIP",
    "SigLIP 2",
    "NaFlex",
    "openai",
    "npz",
    "peft",
)
LIBRARIES = {
    **dict.fromkeys(("open_clip folder", "open_clip checkpoint"), "open_clip"),
    **dict.fromkeys(("state dict", "npz"), "open_clip"),
    **dict.fromkeys(("CLIP", "SigLIP", "SigLIP 2", "NaFlex"), "transformers"),
    "openai": "openai-clip",
    "peft": "peft",
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_sources_library_agrees(sources, tmp_path, name):
    path, flags = sources[name]
    result = verified(path, flags, "clip-jax", tmp_path)
    theirs, again = result.made
    assert result.passed
    assert theirs.reference.startswith(f"{LIBRARIES[name]} ")
    assert (theirs.model, again.model) == ("source", "result")
    assert again.reference == "clip_jax"
    assert again.max_relative_difference == again.pixels == 0.0
    assert theirs.texts_with_other_ids == (None if name == "npz" else 0)
    assert (theirs.pixels is None) == (name == "npz")
    assert "result: clip_jax alone reads its own format" in result.not_compared


@pytest.mark.parametrize("fault", ["a transposed matrix", "another activation"])
@pytest.mark.parametrize("name", SOURCES)
def test_a_fault_of_one_tower(sources, tmp_path, name, fault):
    """Both faults are in different towers, which alternate from source to source."""
    path, flags = sources[name]
    is_matrix = fault == "a transposed matrix"
    is_image = (SOURCES.index(name) % 2 == 0) == is_matrix
    part = "image tower" if is_image else "text tower"
    if is_matrix:
        change = transposed("visual" if is_image else "text")
    else:
        change = activated("vision" if is_image else "text")
    result = verified(path, flags, "clip-jax", tmp_path, change)
    theirs, again = result.made
    assert theirs.differing == (part,)
    assert again.passed  # what clip_jax wrote is what it computed
    assert f"DIFFERENT                {part}: {theirs.reference} loads the source" in (
        result.describe()
    )


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "npz"])
def test_another_tokenizer(sources, tmp_path, name, another_tokenizer):
    path, flags = sources[name]
    result = verified(path, flags, "clip-jax", tmp_path, another_tokenizer)
    assert result.made[0].differing == ("token ids",)


@pytest.mark.parametrize("name", ["open_clip folder", "CLIP", "NaFlex", "openai"])
def test_another_mean_or_scale(sources, tmp_path, name):
    path, flags = sources[name]

    def both(weights: Weights) -> Weights:
        return scaled(reversed_mean(weights))

    result = verified(path, flags, "clip-jax", tmp_path, both)
    assert result.made[0].differing == ("preprocessing", "logit scale or bias")
