"""Our own folder: its manifest."""

import json
from dataclasses import replace

import pytest

import clip_jax
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.errors import InputError
from tests.convert.conftest import assert_same, make_weights, refuse


def test_the_manifest_is_checked(tmp_path):
    write_weights(make_weights("vit"), tmp_path, "clip-jax")
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    assert content["image_activation"] == content["text_activation"] == "quick_gelu"
    assert content["padding_id"] == 0
    assert content["case_folding"] is True
    for name, value, match in [
        ("text_activation", "gelu", "says text_activation='gelu', but config.json implies"),
        ("image_size", 64, "says image_size=64, but the model has 32"),
        ("interpolation", "nearest", "must be one of"),
        ("version", 1, "version 1; 'clip-jax', version 2 is supported"),
    ]:
        path.write_text(json.dumps({**content, name: value}))
        with pytest.raises(ValueError, match=match):
            read_weights(tmp_path)


def test_the_manifest_has_the_template_that_suits_the_model(tmp_path):
    weights = replace(make_weights("vit"), template="{} icon")
    write_weights(weights, tmp_path / "first", "clip-jax")
    model = clip_jax.load(tmp_path / "first")
    model.save(tmp_path / "second")
    assert read_weights(tmp_path / "second").template == model.template == "{} icon"
    path = tmp_path / "second/manifest.json"
    content = json.loads(path.read_text())
    for value, match in [("icon", "has no {}"), (["{}"], "must be a string")]:
        path.write_text(json.dumps({**content, "template": value}))
        with pytest.raises(InputError, match=match):
            read_weights(tmp_path / "second")


def test_a_value_out_of_range_names_its_file(tmp_path):
    write_weights(make_weights("naflex"), tmp_path, "clip-jax")
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "vision": content["vision"] | {"max_patches": 0}}))
    with pytest.raises(InputError, match=r"config.json: vision.max_patches=0 must be at least 1"):
        read_weights(tmp_path)


@pytest.mark.parametrize("value", [10**9, 2**62])
@pytest.mark.parametrize(
    ("tower", "name"),
    [("vision", "image_size"), ("vision", "max_patches"), ("text", "context_length")],
)
def test_a_size_of_no_real_model_takes_no_memory(tmp_path, tower, name, value):
    """An image or a text of that size would be made for the shapes of the parameters."""
    write_weights(make_weights("naflex"), tmp_path, "clip-jax")
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, tower: content[tower] | {name: value}}))
    refuse(tmp_path, rf"config.json: {tower}.{name}={value} must be at least", read_weights)


def test_the_manifest_of_naflex(tmp_path):
    weights = make_weights("naflex")
    write_weights(weights, tmp_path, "clip-jax")
    assert_same(read_weights(tmp_path), weights)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    assert (content["resize_mode"], content["max_patches"], content["patch_size"]) == (
        "naflex",
        20,
        8,
    )
    path.write_text(json.dumps({**content, "max_patches": 21}))
    with pytest.raises(InputError, match="says max_patches=21, but the model has 20"):
        read_weights(tmp_path)
