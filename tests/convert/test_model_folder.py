"""Our own folder: its manifest, its first version."""

import json

import pytest

from clip_jax.convert.formats import read_weights, write_weights
from tests.convert.conftest import make_weights


def test_the_manifest_is_checked(tmp_path):
    write_weights(make_weights("vit"), tmp_path, "clip-jax")
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    assert content["image_activation"] == content["text_activation"] == "quick_gelu"
    assert content["padding_id"] == 0
    assert content["case_folding"] is True
    for name, value, match in [
        ("text_activation", "gelu", "says text_activation='gelu', but config.json means"),
        ("image_size", 64, "says image_size=64; the model has 32"),
        ("interpolation", "nearest", "must be one of"),
        ("version", 3, "version 3; 'clip-jax', versions 1 and 2 are read"),
    ]:
        path.write_text(json.dumps({**content, name: value}))
        with pytest.raises(ValueError, match=match):
            read_weights(tmp_path)


def test_a_folder_of_the_first_version_is_read(tmp_path):
    """Which named its tokenizer and had other words for its rules."""
    write_weights(make_weights("eos"), tmp_path, "clip-jax")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["text"]["tokenizer"], config["text"]["projection"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = json.loads((tmp_path / "manifest.json").read_text())
    for name in ("begin_id", "end_id", "padding_side", "cut"):
        del said[name]
    for tokenizer, file in (("clip", "clip"), ("XLM-V", "")):
        old = said | {"version": 1, "text_cleaning": "lower", "tokenizer": tokenizer}
        (tmp_path / "manifest.json").write_text(json.dumps(old))
        assert read_weights(tmp_path).config.text.tokenizer.file == file
