"""timm's own folders of an image tower alone; tests/reference compares the numbers."""

import json
from dataclasses import replace

import numpy as np
import pytest

from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.tensor_files import read_tensors
from clip_jax.convert.timm import DINO as TIMMS
from clip_jax.convert.timm import dino_name
from clip_jax.errors import InputError
from tests.convert.conftest import DINO, assert_same, cast, make_weights, tower_weights


@pytest.mark.parametrize("name", DINO)
def test_there_and_back(tmp_path, name):
    """With timm's own rule for positions, and the class token's position in the token."""
    weights = cast(tower_weights(DINO[name]), "float16")
    if name == "dinov2_with_registers":
        weights.params["visual"]["positional_embedding"][0] = 0
    write_weights(weights, tmp_path, "timm")
    again = read_weights(tmp_path, one_tower=True)
    assert (again.format, again.only_tower) == ("timm", "image")
    tower = replace(DINO[name], resizing="antialiased")
    config = replace(again.config, vision=tower)
    assert_same(again, replace(weights, config=config))


def test_the_position_of_the_class_token_is_added_to_it(tmp_path):
    weights = tower_weights(DINO["dinov2_with_registers"])
    write_weights(weights, tmp_path, "timm")
    visual, tensors = weights.params["visual"], read_tensors(tmp_path / "model.safetensors")
    token = visual["class_embedding"] + visual["positional_embedding"][0]
    np.testing.assert_array_equal(tensors["cls_token"][0, 0], token)
    np.testing.assert_array_equal(tensors["pos_embed"][0], visual["positional_embedding"][1:])


def test_a_tower_of_timms_sizes_has_its_name():
    for name, tower in TIMMS.items():
        assert dino_name(tower) == name
        assert dino_name(replace(tower, image_size=28)) == name
    assert dino_name(DINO["dinov2"]) == "vit_small_patch14_dinov2"
    assert dino_name(DINO["dinov3_vit"]) == "vit_small_plus_patch16_dinov3"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"architecture": "resnet50"}, r"architecture='resnet50' is not supported .* use one of"),
        ({"model_args": {"img_size": [28, 56]}}, r"image size \[28, 56\] .* must be square"),
        ({"model_args": {"no_embed_class": True}}, "model_args.no_embed_class=True is not supp"),
        ({"pretrained_cfg": {"crop_mode": "border"}}, "crop_mode='border' is not supported"),
        ({"pretrained_cfg": [1]}, "must be an object"),
        ({"model_args": {"embed_dim": "x"}}, "embed_dim is 'x'; it must be an integer"),
    ],
)
def test_settings_that_we_do_not_have_are_named(tmp_path, change, says):
    write_weights(tower_weights(DINO["dinov2"]), tmp_path, "timm")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=says) as error:
        read_weights(tmp_path, one_tower=True)
    assert str(path) in str(error.value)


def test_what_timm_cannot_express(tmp_path):
    rotary = DINO["dinov3_vit"]
    for weights, says in (
        (tower_weights(rotary, None), r"only_tower=None \(needs 'image': use --tower image\)"),
        (tower_weights(replace(rotary, biases="qkv")), r"biases='qkv' \(needs 'qv' or 'none'\)"),
        (tower_weights(replace(rotary, norm_epsilon=1e-6)), r"norm_epsilon=1e-06 \(needs 1e-05\)"),
        (tower_weights(replace(rotary, mlp_ratio=100 / 32)), "gated MLP, 100, to a multiple of 8"),
    ):
        with pytest.raises(InputError, match=says):
            write_weights(weights, tmp_path / "x", "timm")
    (tmp_path / "config.json").write_text('{"architecture": "vit_small_patch14_dinov2"}')
    with pytest.raises(InputError, match="has none of model"):
        read_weights(tmp_path, one_tower=True)


def test_a_folder_with_open_clips_files_is_open_clips(tmp_path):
    """As released folders of CLIPs in timm, which have the image tower in `model.safetensors`."""
    write_weights(make_weights("vit"), tmp_path, "open-clip")
    write_weights(tower_weights(DINO["dinov2"]), tmp_path / "tower", "timm")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "tower" / name).rename(tmp_path / name)
    assert read_weights(tmp_path).format == "open-clip"
