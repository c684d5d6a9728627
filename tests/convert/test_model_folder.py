"""Our own folder: its manifest."""

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
        ("text_activation", "gelu", "says text_activation='gelu', but config.json implies"),
        ("image_size", 64, "says image_size=64, but the model has 32"),
        ("interpolation", "nearest", "must be one of"),
        ("version", 1, "version 1; 'clip-jax', version 2 is supported"),
    ]:
        path.write_text(json.dumps({**content, name: value}))
        with pytest.raises(ValueError, match=match):
            read_weights(tmp_path)
