"""ONNX files run by onnxruntime, at several batch sizes, against the model."""

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import onnx
import pytest

from clip_jax.convert import image_processor
from clip_jax.convert.verify import our_outputs, relative_difference
from clip_jax.errors import InputError
from clip_jax.export import towers
from clip_jax.export.graph import Graph
from clip_jax.export.onnx import other_ids, outputs, write
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TokenizerConfig
from clip_jax.models.vit import ViTConfig
from tests.export.conftest import NAFLEX, SQUARE, Family, programs, rows, shorter


def compared(folder: Path, family: Family, dtype="float32", size: int = 3) -> dict[str, float]:
    """How far each of the exported numbers is from the model's, for the first few rows."""
    given = rows(family.images, size), family.tokens[:size]
    theirs = outputs(folder, "transformers-js", family.weights.config, dtype, *given)
    assert theirs.keys() == family.ours.keys()
    ours = {name: x[:size] for name, x in family.ours.items()}
    ours["logits"] = ours["logits"][:, :size]
    return {name: relative_difference(x, ours[name]) for name, x in theirs.items()}


@pytest.mark.parametrize("name", SQUARE)
def test_every_family_at_two_batch_sizes_from_one_file(tmp_path, families, name):
    """Texts may be padded to the longest of them alone, and not be longer than the model takes; the
    id of padding may occur in them."""
    family = families(name)
    config, images = family.weights.config, family.images
    write(family.weights, tmp_path)
    for size in (1, 3):
        assert max(compared(tmp_path, family, size=size).values()) <= 1e-5
    for path in (tmp_path / "onnx").iterdir():
        onnx.checker.check_model(str(path), full_check=True)
    pad = config.text.tokenizer.pad_id
    short = np.array([[2, 519, pad], [2, pad, 519], [519, pad, pad]], np.int32)
    padding = ((0, 0), (0, config.text.context_length - 3))
    full = np.pad(short, padding, constant_values=pad)
    ours = our_outputs(config, family.weights.params, images, full)
    theirs = outputs(tmp_path, "transformers-js", config, "float32", images, short)
    assert relative_difference(theirs["logits"], ours["logits"]) <= 1e-5
    with pytest.raises(InputError, match=r"text_model\.onnx cannot be run"):
        outputs(tmp_path, "transformers-js", config, "float32", images, np.tile(full, 2))


@pytest.mark.parametrize("name", NAFLEX)
def test_naflex_at_two_lengths_and_batch_sizes_from_one_file(tmp_path, families, name):
    """Images of several shapes, off the grid of positions, and random values in the padding."""
    family = families(name)
    write(family.weights, tmp_path)
    other = shorter(family)
    assert (family.images.pixels.shape[1], other.images.pixels.shape[1]) == (24, 12)
    for sample, size in ((family, 3), (other, 2), (other, 3)):
        assert max(compared(tmp_path, sample, size=size).values()) <= 1e-5
    for path in (tmp_path / "onnx").iterdir():
        onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(tmp_path / "onnx/vision_model.onnx").graph
    inputs = {x.name: x.type.tensor_type for x in graph.input}
    sizes = {name: [x.dim_param or x.dim_value for x in inputs[name].shape.dim] for name in inputs}
    assert sizes["pixel_values"] == ["batch", "patches", 3 * 8 * 8]
    assert sizes["pixel_attention_mask"] == ["batch", "patches"]
    assert sizes["spatial_shapes"] == ["batch", 2]


def test_naflex_folders_are_siglip2s_and_not_immichs(tmp_path, families):
    weights = families("naflex").weights
    write(weights, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    assert (content["architectures"], content["model_type"]) == (["Siglip2Model"], "siglip2")
    sizes = {"model_type": "siglip2_vision_model", "num_patches": 9, "patch_size": 8}
    assert content["vision_config"] == sizes
    how = image_processor.read(tmp_path, 24, "Siglip2", 8)
    assert replace(how, rules="openai") == weights.preprocess
    with pytest.raises(InputError, match=r"immich supports square images only"):
        write(weights, tmp_path, "immich")


@pytest.mark.parametrize("name", ["coca", "mammut"])
def test_captions_are_the_models_greedy_ones(tmp_path, families, name, monkeypatch):
    family = families(name)
    write(family.weights, tmp_path / "captioner-onnx")
    np.save(tmp_path / "digits.npy", family.images)
    monkeypatch.chdir(tmp_path)
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


@pytest.mark.parametrize("name", ["resnet", "siglip", "coca", "naflex", "naflex_mean"])
def test_float16_files_have_their_own_names_and_half_the_size(tmp_path, families, name):
    family = families(name)
    write(family.weights, tmp_path)
    write(family.weights, tmp_path, dtype="float16")
    assert 1e-6 < max(compared(tmp_path, family, "float16").values()) <= 1e-2
    half, full = (tmp_path / f"onnx/vision_model{x}.onnx" for x in ("_fp16", ""))
    assert half.stat().st_size < 0.75 * full.stat().st_size


def test_weights_above_the_limit_lie_beside_the_file(tmp_path, clip):
    write(clip.weights, tmp_path, inline_bytes=30_000)
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "model.onnx_data", "text_model.onnx_data"} <= names
    assert (tmp_path / "onnx/model.onnx").stat().st_size < 60_000
    settings = json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]
    files = ["model.onnx", "text_model.onnx", "vision_model.onnx"]
    assert settings == {"use_external_data_format": dict.fromkeys(files, True)}
    assert max(compared(tmp_path, clip).values()) <= 1e-5
    data = tmp_path / "onnx/vision_model.onnx_data"
    data.write_bytes(data.read_bytes()[:-64])
    with pytest.raises(
        InputError, match=r"vision_model.onnx cannot be run .*its weights beside it"
    ):
        compared(tmp_path, clip)
    data.with_name("vision_model.onnx").unlink()
    with pytest.raises(InputError, match=r"there is no .*vision_model.onnx"):
        compared(tmp_path, clip)


@pytest.mark.parametrize("name", ["mean", "siglip", "mammut", "pe_core", "xlm_roberta"])
def test_the_layout_of_immich(tmp_path, families, name):
    family = families(name)
    config = family.weights.config
    write(family.weights, tmp_path, "immich")
    size = config.vision.image_size
    text = onnx.load(tmp_path / "textual/model.onnx").graph
    assert [x.name for x in text.input] == ["text"]
    assert text.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT32
    pixels = json.loads((tmp_path / "visual/preprocess_cfg.json").read_text())
    assert (pixels["size"], pixels["interpolation"]) == ([size, size], "bicubic")
    words = json.loads((tmp_path / "config.json").read_text())["text_cfg"]
    assert words["context_length"] == config.text.context_length
    assert other_ids(tmp_path, "immich", config.text) == 0
    theirs = outputs(tmp_path, "immich", config, "float32", family.images[:1], family.tokens[:1])
    for key, x in theirs.items():
        expected = family.ours[key][:1] / np.linalg.norm(family.ours[key][:1])
        assert relative_difference(x, expected) <= 1e-5


@pytest.mark.parametrize("clean", ["lower", "canonicalize", "clip"])
def test_each_reader_makes_the_models_ids(tmp_path, families, clean):
    """immich cleans whitespace or canonicalizes, in its own way, and lowers no case."""
    weights = families("siglip").weights
    text = weights.config.text
    text = replace(text, tokenizer=replace(text.tokenizer, clean=clean))
    weights = replace(weights, config=replace(weights.config, text=text))
    for layout, folder in (("immich", "textual"), ("transformers-js", "")):
        write(weights, tmp_path / layout, layout)
        assert other_ids(tmp_path / layout, layout, text) == 0
        path = tmp_path / layout / folder / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": None}))
        assert other_ids(tmp_path / layout, layout, text) >= 2


def test_what_float16_cannot_hold_and_what_readers_cannot_do_is_refused(tmp_path, clip):
    weights = clip.weights
    projection = weights.params["text"]["text_projection"] + np.float32(1e6)
    text = weights.params["text"] | {"text_projection": projection}
    with pytest.raises(InputError, match=r"1e\+06, and float16 ends at 65,504"):
        write(replace(weights, params=weights.params | {"text": text}), tmp_path, dtype="float16")
    two_probes = replace(weights.config.vision)
    object.__setattr__(two_probes, "pool", "two_probes")  # as a later version might have
    with pytest.raises(InputError, match=r"vision.pool='two_probes' has no form in ONNX"):
        write(replace(weights, config=replace(weights.config, vision=two_probes)), tmp_path)
    bars = replace(weights, preprocess=replace(weights.preprocess, resize_mode="longest"))
    with pytest.raises(InputError, match="longest"):
        write(bars, tmp_path)
    left = replace(weights.config.text, tokenizer=TokenizerConfig(pad_side="left"))
    with pytest.raises(InputError, match="immich pads texts on the right"):
        write(replace(weights, config=replace(weights.config, text=left)), tmp_path, "immich")


def test_a_class_that_extends_a_built_in_tower_is_not_exported_as_that():
    class Renamed(ViTConfig):
        pass

    class Other(ViTConfig):
        def module(self, embed_dim, remat, unroll, layout):
            raise NotImplementedError

    class Described(Other):
        def onnx(self, graph, inputs):
            return f"features of {inputs}"

    graph = mock.Mock(spec=Graph, computed=str, exact=str)
    assert towers.image_tower(graph, CLIPConfig(vision=Described()), "x") == "features of x"
    with pytest.raises(InputError, match="Other has no form in ONNX"):
        towers.image_tower(graph, CLIPConfig(vision=Other()), "x")
    with pytest.raises(InputError, match="captions of a Other"):
        towers._caption_tokens(Other(), graph, "x")
    with mock.patch.object(towers, "_vit", return_value=("features", None)):
        graph.has.return_value = False
        assert towers.image_tower(graph, CLIPConfig(vision=Renamed()), "x") == "features"
