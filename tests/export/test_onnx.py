"""ONNX files run by onnxruntime, at every batch size, against the model."""

import json
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import onnx
import pytest
import tokenizers
from PIL import Image

from clip_jax.convert.verify import our_outputs, relative_difference
from clip_jax.export.onnx import caption_reader, outputs, write
from clip_jax.loading import Model
from clip_jax.models import zoo
from clip_jax.predict import embed_labels, probabilities, unit
from clip_jax.refused import Refused
from tests.conftest import ROOT, batch
from tests.export.conftest import greedy


def compared(folder, weights, images, tokens, dtype="float32"):
    """How far each of the exported numbers is from the model's."""
    ours = our_outputs(weights.config, weights.params, images, tokens)
    theirs = outputs(folder, "transformers-js", weights.config, dtype, images, tokens)
    return {name: relative_difference(x, ours[name]) for name, x in theirs.items()}


def inputs(config, size):
    """Normalised pixels and token ids."""
    found = batch(config, 64)
    found["text"][1::2, -4:] = [519, 0, 0, 0]  # which some models see, and some may not
    return (found["image"][:size] / 127.5 - 1).astype(np.float32), found["text"][:size]


@pytest.mark.long
def test_every_family_at_three_batch_sizes_from_one_file(tmp_path, family):
    write(family, tmp_path)
    ours = our_outputs(family.config, family.params, *inputs(family.config, 64))
    for size in (1, 3, 64):
        given = inputs(family.config, size)
        found = outputs(tmp_path, "transformers-js", family.config, "float32", *given)
        for name in ("image_features", "text_features"):
            assert relative_difference(found[name], ours[name][:size]) <= 1e-5
        logits = ours["logits"][:size, :size]
        assert relative_difference(found["logits"], logits) <= 1e-5
        assert ("caption_logits" in found) == ("caption_logits" in ours)
        if "caption_logits" in ours:
            written = ours["caption_logits"][:size]
            assert relative_difference(found["caption_logits"], written) <= 1e-5
    for path in (tmp_path / "onnx").iterdir():
        onnx.checker.check_model(str(path), full_check=True)


@pytest.mark.parametrize("name", ["clip", "siglip", "coca_wrong_mask", "mammut"])
def test_texts_may_be_padded_to_the_longest_of_them_alone(tmp_path, families, name):
    weights = families[name]
    write(weights, tmp_path)
    images, tokens = inputs(weights.config, 3)
    pad = weights.config.text.tokenizer.pad_id
    short = np.array([[2, 519, pad], [2, 3, 519], [519, pad, pad]], np.int32)
    whole = np.pad(short, ((0, 0), (0, tokens.shape[1] - 3)), constant_values=pad)
    ours = our_outputs(weights.config, weights.params, images, whole)
    theirs = outputs(tmp_path, "transformers-js", weights.config, "float32", images, short)
    assert relative_difference(theirs["logits"], ours["logits"]) <= 1e-5
    with pytest.raises(Refused, match=r"text_model\.onnx cannot be run"):  # too long
        outputs(tmp_path, "transformers-js", weights.config, "float32", images, np.tile(whole, 2))


@pytest.mark.parametrize("name", ["coca", "mammut"])
def test_captions_are_the_models_greedy_ones(tmp_path, families, name, monkeypatch):
    weights = families[name]
    write(weights, tmp_path / "onnx")
    images, _ = inputs(weights.config, 3)
    np.save(tmp_path / "images.npy", images)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(caption_reader("onnx", weights.config), found)
    assert found["captions"].tolist() == greedy(weights, images).tolist()
    shown = caption_reader("onnx", zoo.get("coca_ViT-B-32"))
    assert shown in (ROOT / "docs/how-to/export.md").read_text()


def test_float16_files_have_their_own_names_and_half_the_size(tmp_path, family):
    write(family, tmp_path)
    write(family, tmp_path, dtype="float16")
    found = compared(tmp_path, family, *inputs(family.config, 4), dtype="float16")
    assert 1e-6 < max(found.values()) <= 1e-2
    whole, half = (
        (tmp_path / f"onnx/vision_model{x}.onnx").stat().st_size for x in ("", "_fp16")
    )  # fmt: skip
    assert half < 0.75 * whole


def test_weights_above_the_limit_lie_beside_the_file(tmp_path, clip):
    write(clip, tmp_path, inline_bytes=30_000)
    names = {path.name for path in (tmp_path / "onnx").iterdir()}
    assert {"model.onnx", "model.onnx_data", "text_model.onnx_data"} <= names
    assert (tmp_path / "onnx/model.onnx").stat().st_size < 60_000
    settings = json.loads((tmp_path / "config.json").read_text())["transformers.js_config"]
    assert settings == {
        "use_external_data_format": dict.fromkeys(
            ["model.onnx", "text_model.onnx", "vision_model.onnx"], True
        )
    }
    assert max(compared(tmp_path, clip, *inputs(clip.config, 3)).values()) <= 1e-5
    data = tmp_path / "onnx/vision_model.onnx_data"
    data.write_bytes(data.read_bytes()[:-64])
    with pytest.raises(Refused, match=r"vision_model.onnx cannot be run .*its weights beside it"):
        compared(tmp_path, clip, *inputs(clip.config, 3))


def test_features_may_have_unit_length(tmp_path, clip):
    write(clip, tmp_path, normalize=True)
    images, tokens = inputs(clip.config, 3)
    found = outputs(tmp_path, "transformers-js", clip.config, "float32", images, tokens)
    for name in ("image_features", "text_features"):
        np.testing.assert_allclose(np.linalg.norm(found[name], axis=1), 1, rtol=1e-6)


def test_the_layout_of_immich(tmp_path, family):
    write(family, tmp_path, "immich")
    size, length = family.config.vision.image_size, family.config.text.context_length
    text = onnx.load(tmp_path / "textual/model.onnx").graph
    assert [x.name for x in text.input] == ["text"]
    assert text.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT32
    pixels = json.loads((tmp_path / "visual/preprocess_cfg.json").read_text())
    assert (pixels["size"], pixels["interpolation"]) == ([size, size], "bicubic")
    words = json.loads((tmp_path / "config.json").read_text())["text_cfg"]
    assert words["context_length"] == length
    settings = json.loads((tmp_path / "textual/tokenizer_config.json").read_text())
    vocabulary = tokenizers.Tokenizer.from_file(str(tmp_path / "textual/tokenizer.json"))
    pad = vocabulary.token_to_id(settings["pad_token"])
    assert pad == 519 if family.config.text.pool in ("argmax", "eos") else pad in (0, 1)
    images, tokens = inputs(family.config, 1)
    found = outputs(tmp_path, "immich", family.config, "float32", images, tokens)
    ours = our_outputs(family.config, family.params, images, tokens)
    for name, x in found.items():
        expected = ours[name] / np.linalg.norm(ours[name])
        assert relative_difference(x, expected) <= 1e-5


@pytest.mark.parametrize("damage", ["gone", "cut", "another"])
def test_a_wrong_file_is_one_message(tmp_path, clip, damage):
    write(clip, tmp_path)
    path = tmp_path / "onnx/text_model.onnx"
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else b"no graph")
    with pytest.raises(Refused, match=r"text_model\.onnx"):
        compared(tmp_path, clip, *inputs(clip.config, 3))


def test_what_float16_cannot_hold_and_what_readers_cannot_do_is_refused(tmp_path, clip):
    clip.params["text"]["text_projection"][0, 0] = 1e6
    with pytest.raises(Refused, match=r"1e\+06, and float16 ends at 65,504"):
        write(clip, tmp_path, dtype="float16")
    bars = replace(clip, preprocess=replace(clip.preprocess, resize_mode="longest"))
    with pytest.raises(Refused, match="longest"):
        write(bars, tmp_path)


def _no_transformers_js():
    """Why transformers.js cannot be run here; empty if it can."""
    if shutil.which("node") is None:
        return "Node is not installed"
    found = subprocess.run(
        ["node", "-e", "require.resolve('@huggingface/transformers')"], capture_output=True
    )
    if found.returncode:
        return (
            "NODE_PATH has no @huggingface/transformers: ONNXRUNTIME_NODE_INSTALL=skip npm install "
            "@huggingface/transformers, and NODE_PATH=.../node_modules"
        )
    return ""


@pytest.mark.skipif(bool(_no_transformers_js()), reason=_no_transformers_js())
@pytest.mark.parametrize("name", ["clip", "resnet", "siglip", "coca_wrong_mask", "mammut"])
def test_transformers_js_gives_the_models_numbers(tmp_path, families, name):
    weights = families[name]
    write(weights, tmp_path / "exported")
    images, tokens = inputs(weights.config, 3)
    size = weights.config.vision.image_size
    gradient = np.linspace(0, 255, 60, dtype=np.uint8)
    picture = np.stack(np.broadcast_arrays(gradient, gradient[:40, None], gradient[7]), axis=2)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    labels, template = ["cat", "dog", "seven", "a house"], "a {}"
    given = {
        "pixels": images.transpose(0, 3, 1, 2).ravel().tolist(), "shape": [3, 3, size, size],
        "ids": tokens.ravel().tolist(), "ids_shape": list(tokens.shape),
        "image": str(tmp_path / "picture.png"), "labels": labels, "template": template,
    }  # fmt: skip
    (tmp_path / "inputs.json").write_text(json.dumps(given))
    kind = "siglip" if name == "siglip" else "clip"
    done = subprocess.run(
        ["node", str(ROOT / "tests/export/transformers.cjs"), tmp_path / "exported",
         tmp_path / "inputs.json", kind],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])
    ours = our_outputs(weights.config, weights.params, images, tokens)
    for key in ("image_features", "text_features", "logits"):
        assert relative_difference(np.array(theirs[key]), ours[key].ravel()) <= 1e-4
    model = Model(weights.config, weights.params, weights.preprocess)
    features = unit(model.encode_image(model.preprocess([picture])))
    if name == "siglip":
        classes = embed_labels(model, labels, template)
        logits = features @ classes.T * np.exp(weights.params["logit_scale"])
        expected = 1 / (1 + np.exp(-logits - weights.params["logit_bias"]))[0]
    else:
        expected = probabilities(model, features, embed_labels(model, labels, template))[0]
    got = {x["label"]: x["score"] for x in theirs["found"]}
    assert theirs["found"][0]["label"] == labels[int(np.argmax(expected))]
    np.testing.assert_allclose([got[label] for label in labels], expected, rtol=0, atol=0.02)
