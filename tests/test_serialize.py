"""Every architecture survives JSON; what a file gets wrong is named."""

import json
from pathlib import Path

import pytest

from clip_jax.models import zoo
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.resnet import ResNetConfig
from clip_jax.serialize import from_dict, to_dict


def test_round_trip():
    for name in ("ViT-B/32", "ViT-bigG-14", "RN50x4", "ViT-B-16-SigLIP"):
        config = zoo.get(name)
        assert from_dict(CLIPConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_missing_fields_take_defaults():
    data = {"vision": {"type": "ResNetConfig", "width": 80, "num_heads": 40}}
    config = from_dict(CLIPConfig, data)
    assert config.vision == ResNetConfig(width=80, num_heads=40)
    assert config.text == CLIPConfig().text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"embed_dims": 512},
            r"config has unknown fields \['embed_dims'\]; CLIPConfig has embed.*update clip_jax",
        ),
        ({"embed_dim": True}, r"config.embed_dim is True; it must be of type int"),
        ({"dtype": "float16"}, r"config.dtype is 'float16'; it must be one of \['float32'"),
        ({"vision": {"width": 768}}, r"config.vision.type is None; it must be one of .*'ConvNeXt"),
        (
            {"vision": {"type": ["ViTConfig"]}},
            r"config.vision.type is \['ViTConfig'\]; it must be one",
        ),
        (
            {"text": {"type": "ViTConfig"}},
            r"config.text.type is 'ViTConfig'; it must be one of .*'Bert",
        ),
        (
            {"text": {"type": "TextConfig", "width": 100, "num_heads": 3}},
            r"text.width=100 must be a multiple of",
        ),
        ({"image_mean": [0.5, 0.5]}, r"config.image_mean has 2 values; it must have 3"),
        ({"image_mean": [0.5, 0.5, "x"]}, r"config.image_mean\[2\] is 'x'"),
        (
            {"image_mean": [0, 0, 10**400]},
            r"config.image_mean\[2\] is 10+; it must be of type float",
        ),
        ([], r"config is \[\]; it must be an object"),
    ],
)
def test_errors_name_the_place(data, message):
    with pytest.raises(ValueError, match=message):
        from_dict(CLIPConfig, data)


def test_other_annotations():
    assert from_dict(tuple[int, ...], [1, 2, 3]) == (1, 2, 3)
    assert from_dict(float | None, None) is None
    assert from_dict(float | None, 1) == 1.0
    assert from_dict(Path | None, "a/b") == Path("a/b")
    assert to_dict(Path("a/b")) == "a/b"
