"""Small models of each family, their outputs, and checks of exported files."""

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
import pytest

from clip_jax.convert.verify import our_outputs, relative_difference
from clip_jax.convert.weights import Weights, default_preprocess
from clip_jax.errors import InputError
from clip_jax.export.onnx import other_ids, outputs, write
from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.images import Images, Patches, concatenate
from clip_jax.models.text import TokenizerConfig
from clip_jax.models.vit import ViTConfig
from tests import conftest, vocabularies
from tests.conftest import CAPPA, COCA, MAMMUT, RESNET, ROOT, TINY, batch, parameters

RULES = TokenizerConfig(file="", clean="punctuation", end_id=1, pad_id=1)


SIGLIP, SMALL = zoo.get("ViT-B-16-SigLIP"), {"width": 32, "depth": 2, "num_heads": 2}


def naflex(config: CLIPConfig) -> CLIPConfig:
    """The same model for at most 24 patches, with position embeddings of 3 x 3 patches."""
    return replace(config, vision=replace(config.vision, image_size=24, max_patches=24))


def with_pool(config: CLIPConfig, pool: str, **changes: Any) -> CLIPConfig:
    return replace(config, vision=replace(config.vision, pool=pool, **changes))


FAMILIES = {
    "clip": TINY,
    "mean": replace(
        TINY,
        vision=ViTConfig(
            image_size=16,
            patch_size=8,
            width=32,
            depth=2,
            num_heads=2,
            pool="mean",
            pre_norm=False,
            layer_scale=0.5,
            activation="gelu",
            mlp_ratio=3.3,
        ),
        text=replace(TINY.text, pool="eos", eos_token_id=519, activation="gelu_tanh"),
    ),
    "resnet": RESNET,
    "coca": COCA,
    # Towers of different depth, no pool of queries, and the mask of the released models.
    "coca_wrong_mask": replace(
        COCA,
        vision=replace(TINY.vision, depth=1),
        text=replace(COCA.text, correct_class_mask=False),
    ),
    "mammut": MAMMUT,
    "cappa": CAPPA,
    "siglip": replace(
        SIGLIP,
        embed_dim=32,
        dtype="float32",
        # 35 pixels, of which patches cover 32
        vision=replace(SIGLIP.vision, image_size=35, patch_size=8, **SMALL),
        text=replace(SIGLIP.text, context_length=16, vocab_size=520, tokenizer=RULES, **SMALL),
    ),
}
FAMILIES["naflex"] = naflex(FAMILIES["siglip"])
FAMILIES |= conftest.FAMILIES
# Captioners with each kind of pool, and decoders of one block.
SHALLOW = replace(COCA, text=replace(COCA.text, depth=1), decoder=replace(COCA.decoder, depth=1))
WRITERS = {
    "class_token": with_pool(SHALLOW, "class_token"),
    "mean": with_pool(SHALLOW, "mean"),
    "mean_all": replace(MAMMUT, text=replace(MAMMUT.text, depth=2)),
    "map": with_pool(SHALLOW, "map", class_token=False),
    "queries": SHALLOW,
}
FAMILIES |= {f"naflex_{pool}": naflex(config) for pool, config in WRITERS.items()}
# Captions attend to patches alone, and not to registers.
FAMILIES["dinov3_coca"] = replace(SHALLOW, vision=FAMILIES["dinov3"].vision)
# Families of the unit tests; tests/mesh has the others.
IN_UNIT_TESTS = ("clip", "resnet", "coca", "naflex_mean_all")
SQUARE = [name for name in FAMILIES if "naflex" not in name]
NAFLEX = [name for name in FAMILIES if "naflex" in name]


def patches(config: CLIPConfig, grids: Sequence[tuple[int, int]]) -> Patches:
    """Draw images with these rows and columns of patches. Their padding is random, too."""
    spec = config.vision.image_spec
    shapes = [(1, spec.patch_size * down, spec.patch_size * across, 3) for down, across in grids]
    images = concatenate([spec.pack(np.zeros(shape, np.uint8)) for shape in shapes])
    drawn = np.random.default_rng(len(grids)).normal(size=images.pixels.shape)
    return replace(images, pixels=drawn.astype(np.float32))


def shorter(family: "Family") -> "Family":
    """Return the family with images of other shapes, padded to half as many patches.

    The expected outputs are those at the usual length, for which the model is already compiled.
    """
    images = patches(family.weights.config, [(7, 1), (1, 1), (3, 4)])
    ours = our_outputs(family.weights.config, family.weights.params, images, family.tokens)
    return replace(family, images=replace(images, pixels=images.pixels[:, :12]), ours=ours)


def rows(images: Images, size: int) -> Images:
    """Return the first images."""
    return jax.tree.map(lambda x: x[:size], images)


def programs():
    """Return programs of the how-to page: StableHLO towers, StableHLO captions, ONNX captions."""
    page = (ROOT / "docs/how-to/export.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    marks = ("text_features = ", "caption_next", "caption_model")
    return [next(block for block in blocks if mark in block) for mark in marks]


@dataclass(frozen=True)
class Family:
    """A model with inputs (three images and texts) and its outputs."""

    weights: Weights
    images: Images
    tokens: np.ndarray
    ours: dict[str, np.ndarray]


def compared(folder: Path, family: Family, dtype="float32", size: int = 3) -> dict[str, float]:
    """Return the relative difference of each exported output from the model's."""
    given = rows(family.images, size), family.tokens[:size]
    theirs = outputs(folder, "transformers-js", family.weights.config, dtype, *given)
    assert theirs.keys() == family.ours.keys()
    ours = {name: x[:size] for name, x in family.ours.items()}
    ours["logits"] = ours["logits"][:, :size]
    return {name: relative_difference(x, ours[name]) for name, x in theirs.items()}


def check_square(folder: Path, family: Family) -> None:
    """Check one file at two batch sizes.

    Texts may be padded to the longest one only, and may contain the id of padding. They must not be
    longer than the model's context.
    """
    config, images = family.weights.config, family.images
    write(family.weights, folder)
    for size in (1, 3):
        assert max(compared(folder, family, size=size).values()) <= 1e-5
    for path in (folder / "onnx").iterdir():
        onnx.checker.check_model(str(path), full_check=True)
    pad = config.text.tokenizer.pad_id
    short = np.array([[2, 519, pad], [2, pad, 519], [519, pad, pad]], np.int32)
    padding = ((0, 0), (0, config.text.context_length - 3))
    full = np.pad(short, padding, constant_values=pad)
    ours = our_outputs(config, family.weights.params, images, full)
    theirs = outputs(folder, "transformers-js", config, "float32", images, short)
    assert relative_difference(theirs["logits"], ours["logits"]) <= 1e-5
    with pytest.raises(InputError, match=r"text_model\.onnx cannot be run"):
        outputs(folder, "transformers-js", config, "float32", images, np.tile(full, 2))


def check_naflex(folder: Path, family: Family) -> None:
    """Check one file at two lengths and batch sizes.

    Images have several shapes, other than the grid of positions, and random padding.
    """
    write(family.weights, folder)
    other = shorter(family)
    assert (family.images.pixels.shape[1], other.images.pixels.shape[1]) == (24, 12)
    for sample, size in ((family, 3), (other, 2), (other, 3)):
        assert max(compared(folder, sample, size=size).values()) <= 1e-5
    for path in (folder / "onnx").iterdir():
        onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(folder / "onnx/vision_model.onnx").graph
    inputs = {x.name: x.type.tensor_type for x in graph.input}
    sizes = {name: [x.dim_param or x.dim_value for x in inputs[name].shape.dim] for name in inputs}
    assert sizes["pixel_values"] == ["batch", "patches", 3 * 8 * 8]
    assert sizes["pixel_attention_mask"] == ["batch", "patches"]
    assert sizes["spatial_shapes"] == ["batch", 2]


def check_captions(folder: Path, family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the page's program writes the model's greedy captions."""
    write(family.weights, folder / "captioner-onnx")
    np.save(folder / "digits.npy", family.images)
    monkeypatch.chdir(folder)
    names = {}
    config, params = family.weights.config, family.weights.params
    length, begin = config.text.context_length, config.text.begin_id
    program = programs()[2].replace("4094", str(begin)).replace("16", str(length))
    exec(program, names)
    ids = names["captions"].astype(np.int32)
    assert ids.shape == (3, config.text.context_length)
    assert (ids[:, 0] == config.text.begin_id).all()
    logits = our_outputs(config, params, family.images, ids)["caption_logits"]
    np.testing.assert_array_equal(ids[:, 1:], logits.argmax(axis=-1))


def check_float16(folder: Path, family: Family) -> None:
    """Check that float16 files have their own names and half the size."""
    write(family.weights, folder)
    write(family.weights, folder, dtype="float16")
    assert 1e-6 < max(compared(folder, family, "float16").values()) <= 1e-2
    half, full = (folder / f"onnx/vision_model{x}.onnx" for x in ("_fp16", ""))
    assert half.stat().st_size < 0.75 * full.stat().st_size


def check_immich(folder: Path, family: Family) -> None:
    """Check the layout of immich."""
    config = family.weights.config
    write(family.weights, folder, "immich")
    size = config.vision.image_size
    text = onnx.load(folder / "textual/model.onnx").graph
    assert [x.name for x in text.input] == ["text"]
    assert text.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT32
    pixels = json.loads((folder / "visual/preprocess_cfg.json").read_text())
    assert (pixels["size"], pixels["interpolation"]) == ([size, size], "bicubic")
    words = json.loads((folder / "config.json").read_text())["text_cfg"]
    assert words["context_length"] == config.text.context_length
    assert other_ids(folder, "immich", config.text) == 0
    theirs = outputs(folder, "immich", config, "float32", family.images[:1], family.tokens[:1])
    for key, x in theirs.items():
        expected = family.ours[key][:1] / np.linalg.norm(family.ours[key][:1])
        assert relative_difference(x, expected) <= 1e-5


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    """Return a function that makes a family by its name, once."""

    @functools.cache
    def make_family(name: str) -> Family:
        config = FAMILIES[name]
        if name in ("siglip", "naflex"):
            words = tmp_path_factory.mktemp("words") / "spiece.model"
            vocabularies.sentencepiece_model(words)
            rules = replace(RULES, file=str(words))
            config = replace(config, text=replace(config.text, tokenizer=rules))
        params, made = jax.tree.map(np.asarray, parameters(config)), batch(config, 64)
        weights = Weights(config=config, params=params, preprocess=default_preprocess(config))
        tokens = made["text"][:3]
        tokens[1, -4:] = [519, 0, 0, 0]  # padding, which only some models attend to
        if name in NAFLEX:
            positions = params["visual"]["positional_embedding"]
            positions *= np.float32(5)  # so large that wrong resizing matters
            images = patches(config, [(3, 5), (1, 24), (2, 2)])
        else:
            images = (made["image"][:3] / 127.5 - 1).astype(np.float32)
        ours = our_outputs(config, params, images, tokens)
        return Family(weights, images, tokens, ours)

    return make_family


@pytest.fixture
def clip(families: Callable[[str], Family]) -> Family:
    """Return the family of CLIP."""
    return families("clip")
