"""ONNX files run by onnxruntime, at several batch sizes, against the model."""

import json
from dataclasses import replace
from unittest import mock

import numpy as np
import onnx
import pytest

from clip_jax.convert import image_processor
from clip_jax.errors import InputError
from clip_jax.export import towers
from clip_jax.export.graph import Graph
from clip_jax.export.onnx import other_ids, write
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TokenizerConfig
from clip_jax.models.vit import ViTConfig
from tests.export.conftest import (
    IN_UNIT_TESTS,
    NAFLEX,
    SQUARE,
    check_captions,
    check_float16,
    check_immich,
    check_naflex,
    check_square,
    compared,
)


@pytest.mark.parametrize("name", [name for name in IN_UNIT_TESTS if name in SQUARE])
def test_one_file_at_two_batch_sizes(tmp_path, families, name):
    check_square(tmp_path, families(name))


@pytest.mark.parametrize("name", [name for name in IN_UNIT_TESTS if name in NAFLEX])
def test_one_file_of_naflex_at_two_lengths_and_batch_sizes(tmp_path, families, name):
    check_naflex(tmp_path, families(name))


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


def test_captions_are_the_models_greedy_ones(tmp_path, families, monkeypatch):
    check_captions(tmp_path, families("coca"), monkeypatch)


@pytest.mark.parametrize("name", ["resnet", "siglip", "coca", "naflex_mean_all"])
def test_float16_files_have_their_own_names_and_half_the_size(tmp_path, families, name):
    check_float16(tmp_path, families(name))


def test_the_layout_of_immich(tmp_path, families):
    check_immich(tmp_path, families("siglip"))


def test_weights_above_the_limit_lie_beside_the_file(tmp_path, clip):
    write(clip.weights, tmp_path, inline_bytes=30_000)
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "model.onnx_data", "text_model.onnx_data"} <= names
    assert (tmp_path / "onnx/model.onnx").stat().st_size < 60_000
    settings = json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]
    files = ["model.onnx", "text_model.onnx", "vision_model.onnx"]
    assert settings == {"use_external_data_format": dict.fromkeys(files, True)}
    assert max(compared(tmp_path, clip).values()) <= 1e-5
    for path in (tmp_path / "onnx").glob("*.onnx"):  # memory-mapped, so at pages' boundaries
        model = onnx.load(path, load_external_data=False)
        entries = [{x.key: x.value for x in y.external_data} for y in model.graph.initializer]
        spans = [(int(x["offset"]), int(x["length"])) for x in entries if x]
        ends = [0, *(offset + length for offset, length in spans)]
        gaps = [offset - end for (offset, _), end in zip(spans, ends, strict=False)]
        assert not any(offset % 4096 for offset, _ in spans)
        assert all(0 <= gap < 4096 for gap in gaps)
        assert path.with_name(f"{path.name}_data").stat().st_size == ends[-1]
    data = tmp_path / "onnx/vision_model.onnx_data"
    data.write_bytes(data.read_bytes()[:-64])
    with pytest.raises(
        InputError, match=r"vision_model.onnx cannot be run .*its weights beside it"
    ):
        compared(tmp_path, clip)
    data.with_name("vision_model.onnx").unlink()
    with pytest.raises(InputError, match=r"there is no .*vision_model.onnx"):
        compared(tmp_path, clip)


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
