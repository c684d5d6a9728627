"""Hugging Face's settings of pixels: which of two files counts, and what is refused in them."""

import json
from dataclasses import replace

import pytest

from clip_jax.convert import image_processor
from clip_jax.data.images import OPENAI_MEAN, Preprocess
from clip_jax.errors import InputError

SETTINGS = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}
CLIPS = Preprocess(image_size=32, rules="transformers")
MEANT = replace(CLIPS, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), interpolation="bilinear")


def test_of_two_files_the_processors_own_counts(tmp_path):
    """As `CLIPProcessor.save_pretrained` has written it since transformers 5."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS | {"resample": 3}))
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps({"processor_class": "CLIPProcessor"}))  # an older one, without any
    assert image_processor.read(tmp_path, 32).interpolation == "bicubic"
    path.write_text(json.dumps({"image_processor": SETTINGS, "processor_class": "CLIPProcessor"}))
    assert image_processor.read(tmp_path, 32) == MEANT
    image_processor.write(tmp_path, replace(CLIPS, rules="openai"))
    assert image_processor.read(tmp_path, 32) == CLIPS  # what is written counts


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"image_processor": [1]}, "image_processor is [1]; an object is needed"),
        ({"image_processor": SETTINGS | {"size": 31}}, "size={'shortest_edge': 31}"),
        ({"image_processor": SETTINGS | {"resample": 0}}, "resample=0"),
        ({"image_processor": SETTINGS | {"image_mean": [0.5, 0.5]}}, "mean has 2 values"),
        ({"image_processor": SETTINGS | {"image_std": [0.5, 0, 0.5]}}, "must be more than 0"),
        ({"image_processor": {"image_processor_type": "Blip", "resample": 3}}, "type='Blip' is"),
        ({"image_processor": SETTINGS | {"size": 400}}, "crop_ratio=0.08 must be"),
        ({"image_processor": SETTINGS | {"crop_size": None}}, "crop_size={'height': 224"),
        ({"image_processor": SETTINGS | {"do_pad": True}}, "do_pad"),
    ],
)
def test_what_we_do_not_have_is_named(tmp_path, content, says):
    path = tmp_path / "processor_config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        image_processor.read(tmp_path, 32)
    assert says in str(error.value)
    assert str(path) in str(error.value)


NAFLEX = Preprocess(
    image_size=64,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    interpolation="bilinear",
    resize_mode="naflex",
    max_patches=40,
    patch_size=16,
    rules="torchvision",
)


@pytest.mark.parametrize("rules", ["torchvision", "transformers", "openai", "tensorflow"])
def test_naflex_there_and_back(tmp_path, rules):
    """Its two classes are two rules; those that transformers lacks become torchvision's."""
    image_processor.write(tmp_path, replace(NAFLEX, rules=rules, interpolation="bicubic"), "Siglip")
    written = rules if rules == "transformers" else "torchvision"
    expected = replace(NAFLEX, rules=written, interpolation="bicubic")
    assert image_processor.read(tmp_path, 64, "Siglip2", 16) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, {}),
        ({"image_processor_type": "Siglip2ImageProcessorFast"}, {}),
        ({"image_processor_type": "Siglip2ImageProcessorPil"}, {"rules": "transformers"}),
        ({"max_num_patches": 576, "image_mean": [0, 0, 0]}, {"max_patches": 576, "mean": (0,) * 3}),
    ],
)
def test_what_a_naflex_file_leaves_out(tmp_path, content, expected):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    default = replace(NAFLEX, max_patches=256)
    assert image_processor.read(tmp_path, 64, "Siglip2", 16) == replace(default, **expected)


@pytest.mark.parametrize(
    ("content", "patch_size", "says"),
    [
        ({"patch_size": 14}, 16, "patch_size=14 differs from the model's, 16"),
        ({"max_num_patches": 0}, 16, "max_num_patches is 0"),
        ({"do_resize": False}, 16, "do_resize"),
        ({"image_processor_type": "SiglipImageProcessor"}, 16, "need each other"),
        ({"image_processor_type": "Siglip2ImageProcessor"}, None, "need each other"),
    ],
)
def test_a_naflex_processor_fits_its_model(tmp_path, content, patch_size, says):
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        image_processor.read(tmp_path, 64, "Siglip2" if patch_size else "Siglip", patch_size)
    assert says in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("kind", "model", "expected"),
    [
        (None, "CLIP", ("shortest", "bicubic", OPENAI_MEAN)),
        (None, "Siglip", ("squash", "bicubic", (0.5, 0.5, 0.5))),
        (None, "Tipsv2", ("squash", "bilinear", (0.0, 0.0, 0.0))),
        ("CLIPFeatureExtractor", "Siglip", ("shortest", "bicubic", OPENAI_MEAN)),
        ("ChineseCLIPImageProcessor", "CLIP", ("shortest", "bicubic", OPENAI_MEAN)),
        ("SiglipImageProcessorFast", "CLIP", ("squash", "bicubic", (0.5, 0.5, 0.5))),
        ("ViTImageProcessor", "CLIP", ("squash", "bilinear", (0.5, 0.5, 0.5))),
    ],
)
def test_what_a_file_leaves_out_its_class_decides(tmp_path, kind, model, expected):
    content = {"image_processor_type": kind, "size": None}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    pixels = image_processor.read(tmp_path, 448 if model == "Tipsv2" else 224, model)
    assert (pixels.resize_mode, pixels.interpolation, pixels.mean) == expected


@pytest.mark.parametrize(("normalizes", "mean"), [(None, 0.0), (False, 0.0), (True, 0.5)])
def test_tipsv2_normalises_only_where_its_file_says_so(tmp_path, normalizes, mean):
    """The default of its class, unlike that of all others."""
    content = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": normalizes}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert image_processor.read(tmp_path, 448, "Tipsv2").mean == (mean,) * 3


def test_tipsv2_has_no_mean_of_its_own(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": True}))
    with pytest.raises(InputError, match="do_normalize=True needs image_mean"):
        image_processor.read(tmp_path, 448, "Tipsv2")


def test_without_a_file_the_size_is_the_models(tmp_path):
    assert image_processor.read(tmp_path, 32) == CLIPS


@pytest.mark.parametrize(("kind", "mode"), [("CLIP", "shortest"), ("ViT", "squash")])
def test_a_size_that_is_one_number(tmp_path, kind, mode):
    """It is the shorter side, or that of a square."""
    content = {"image_processor_type": f"{kind}ImageProcessor", "size": 32, "crop_size": 32}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert image_processor.read(tmp_path, 32).resize_mode == mode


def test_a_missing_file_is_named(tmp_path):
    """Without it the class's patch size counts, and a message would begin with a colon."""
    with pytest.raises(InputError, match=r"preprocessor_config.json: patch_size=16 differs .*14"):
        image_processor.read(tmp_path, 64, "Siglip2", 14)
