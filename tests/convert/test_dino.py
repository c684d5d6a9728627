"""Folders of DINOv2 and DINOv3: an image tower alone, as a source of a two-tower model."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from clip_jax.cli.commands import main
from clip_jax.config import Config
from clip_jax.config_files import with_weights
from clip_jax.convert import hugging_face, image_processor
from clip_jax.convert.fitting import starting_params
from clip_jax.convert.formats import able_formats, read_weights, write_weights
from clip_jax.convert.weights import Weights
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.image_head import ImageHeadConfig
from tests.conftest import FAMILIES, TINY, parameters
from tests.convert.conftest import DINO, assert_same, cast, tower_weights


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", DINO)
def test_there_and_back(tmp_path, name, dtype):
    weights = cast(tower_weights(DINO[name]), dtype)
    assert able_formats(weights) == ["hugging-face", "timm"]
    write_weights(weights, tmp_path, "hugging-face")
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name
    again = read_weights(tmp_path, one_tower=True)
    assert again.only_tower == "image"
    assert not again.config.text.tokenizer.file
    rules = replace(weights.preprocess, rules="transformers")
    assert_same(again, replace(weights, config=replace(again.config), preprocess=rules))
    assert again.config.vision == weights.config.vision


def test_a_folder_of_an_image_tower_starts_the_image_side(tmp_path):
    """With its architecture and pixels; text tower and context length are those of the config."""
    write_weights(tower_weights(DINO["dinov3_vit"]), tmp_path, "hugging-face")
    config = Config(
        model=TINY, init_from=str(tmp_path), init_architecture=True, init_towers=("image",)
    )
    filled = with_weights(config)
    assert (filled.model.vision, filled.model.text) == (DINO["dinov3_vit"], TINY.text)
    assert (filled.model.embed_dim, filled.model.dtype) == (32, "float32")
    assert filled.preprocess == read_weights(tmp_path, one_tower=True).preprocess
    weights = read_weights(tmp_path, one_tower=True)
    assert starting_params(weights, filled.model, ("image",)).keys() == {"visual"}
    with pytest.raises(InputError, match=r"holds the image tower .* start one by --init-from"):
        with_weights(replace(config, init_towers=("image", "text")))


def test_a_folder_of_an_image_tower_starts_a_model_with_a_head(tmp_path):
    """The embedding stays twice as wide as the tower; a source with a head gives it, too."""
    write_weights(tower_weights(DINO["dinov3_vit"]), tmp_path, "hugging-face")
    model = replace(FAMILIES["dinotxt"], vision=DINO["dinov3_vit"])
    config = Config(
        model=model, init_from=str(tmp_path), init_architecture=True, init_towers=("image",)
    )
    filled = with_weights(config).model
    assert (filled.embed_dim, filled.image_head) == (64, model.image_head)
    tower = read_weights(tmp_path, one_tower=True)
    assert starting_params(tower, filled, ("image",)).keys() == {"visual"}
    complete = Weights(config=filled, params=parameters(filled), preprocess=tower.preprocess)
    assert starting_params(complete, filled, ("image",)).keys() == {"visual", "image_head"}
    with pytest.raises(InputError, match=r"image_head has shape|image_head/"):
        starting_params(complete, replace(filled, image_head=ImageHeadConfig(depth=1)))


@pytest.mark.parametrize("side", [24, 56])
def test_positions_are_resized_for_the_model_that_starts(tmp_path, side):
    tower = DINO["dinov2"]
    write_weights(tower_weights(tower), tmp_path, "hugging-face")
    weights = read_weights(tmp_path, one_tower=True)
    model = replace(weights.config, vision=tower.with_image_size(side))
    table = starting_params(weights, model, ("image",))["visual"]["positional_embedding"]
    before = np.asarray(weights.params["visual"]["positional_embedding"])
    np.testing.assert_array_equal(table[0], before[0])
    resized = tower.resize_grid(before[1:], side // 8).astype(np.float32)
    np.testing.assert_array_equal(table[1:], resized)


def test_what_transformers_cannot_express(tmp_path):
    learned, rotary = DINO["dinov2"], DINO["dinov3_vit"]
    for weights, says in (
        (tower_weights(rotary, None), r"DINOv3ViTModel .*only_tower=None.*use --tower image\)"),
        (tower_weights(replace(learned, biases="qv")), r"biases='qv' \(needs 'qkv' or 'none'"),
        (tower_weights(replace(learned, mlp_ratio=3.4)), r"mlp_width=108 \(needs 96"),
        (tower_weights(replace(rotary, layer_scale=None)), r"layer_scale=None \(needs float"),
    ):
        with pytest.raises(InputError, match=says):
            write_weights(weights, tmp_path / "x", "hugging-face")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_theta": 10.0}, r"rope_theta=10\.0 is not supported; it must be 100\.0"),
        ({"key_bias": True}, r"query_bias, key_bias, value_bias=\(False, True, False\)"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; it must be silu"),
        ({"use_gated_mlp": False}, "hidden_act='silu' is not supported; it must be one of quick"),
        ({"num_channels": 4}, "num_channels=4 is not supported; it must be 3"),
        ({"proj_bias": False}, "proj_bias=False"),
    ],
)
def test_settings_that_we_do_not_have_are_named(tmp_path, change, says):
    write_weights(tower_weights(DINO["dinov3_vit"]), tmp_path, "hugging-face")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=says):
        read_weights(tmp_path, one_tower=True)


def test_the_released_processor_of_dinov2(tmp_path):
    """It resizes to 256 pixels and crops 224, for a tower with positions of 518."""
    content = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 256},
        "crop_size": {"height": 224, "width": 224},
        "do_center_crop": True,
        "resample": 3,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
    }
    (tmp_path / "again").mkdir()
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(content))
    pixels = image_processor.read(tmp_path, 518, "Bit", at_any_size=True)
    assert (pixels.image_size, pixels.resize_mode) == (518, "shortest")
    assert (pixels.crop_ratio, pixels.shorter_side) == (0.875, 592)
    assert pixels.mean == (0.485, 0.456, 0.406)
    own_size = image_processor.read(tmp_path, 224, "Bit")
    assert (own_size.crop_ratio, own_size.shorter_side) == (0.875, 256)
    image_processor.write(tmp_path / "again", own_size, "Bit")
    again = json.loads((tmp_path / "again/preprocessor_config.json").read_text())
    assert content.items() <= again.items()
    with pytest.raises(InputError, match="is not supported for a model with image size 518"):
        image_processor.read(tmp_path, 518)
    path.write_text(json.dumps(content | {"size": {"shortest_edge": 256.5}}))
    with pytest.raises(InputError, match="is not supported for a model with image size 518"):
        image_processor.read(tmp_path, 518, "Bit", at_any_size=True)


def test_the_licence_of_dinov3_is_in_the_card(tmp_path):
    for name, tower in DINO.items():
        folder = tmp_path / name
        write_weights(tower_weights(tower), folder, "hugging-face")
        out = tmp_path / f"{name} again"
        assert main(["convert", str(folder), str(out), "--to", "hugging-face"]) == 0
        card = (out / "README.md").read_text()
        assert "An image tower written by clip_jax" in card
        assert ("DINOv3 License" in card) == (name == "dinov3_vit")


def test_every_class_is_read_by_its_defaults():
    """`Dinov2Config()` and the others are the sizes of released towers."""
    names = [family.class_name for family in hugging_face.FAMILIES[:4]]
    kinds = ["Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"]
    assert list(dict.fromkeys(names)) == kinds
    config: CLIPConfig = hugging_face.FAMILIES[0].read({}, Path("config.json"))
    assert (config.embed_dim, config.vision.patch_size) == (768, 14)
