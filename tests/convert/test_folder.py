"""Our own folder: its manifest, its first version, one in a bucket."""

import json
from dataclasses import replace

import numpy as np
import pytest

from clip_jax import files
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.tokenizers.vocabulary import keep
from clip_jax.models.text import TokenizerConfig
from tests import vocabularies


def test_the_manifest_is_checked(tmp_path, make_weights):
    write_weights(make_weights("vit"), tmp_path, "clip-jax")
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    assert content["image_activation"] == content["text_activation"] == "quick_gelu"
    assert content["padding_id"] == 0
    assert content["case_folding"] is True
    for name, value, match in [
        ("text_activation", "gelu", "says text_activation='gelu', but config.json means"),
        ("text_pooling", "last", "says text_pooling='last'"),
        ("image_size", 64, "says image_size=64; the model has 32"),
        ("interpolation", "nearest", "must be one of"),
        ("text_cleaning", "lower", "says text_cleaning='lower', but config.json means 'clip'"),
        ("padding_id", 7, "says padding_id=7"),
        ("version", 3, "version 3; 'clip-jax', versions 1 and 2 are read"),
    ]:
        path.write_text(json.dumps({**content, name: value}))
        with pytest.raises(ValueError, match=match):
            read_weights(tmp_path)


def test_a_folder_of_the_first_version_is_read(tmp_path, make_weights):
    """Which named its tokenizer and had other words for its rules."""
    weights = make_weights("eos")
    write_weights(weights, tmp_path, "clip-jax")
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


def test_a_vocabulary_goes_with_a_folder_in_a_bucket(gs, tmp_path, make_weights):
    """And stays there: what a folder is read by is a copy for a while."""
    words = vocabularies.unigram(tmp_path / "words.json")
    weights = make_weights("vit")
    tokenizer = TokenizerConfig(file=str(words), clean="lower", begin_id=0, end_id=2, pad_id=1)
    text = replace(weights.config.text, pool="last", tokenizer=tokenizer)
    weights = replace(weights, config=replace(weights.config, text=text))
    url = f"{gs.url}/model"
    write_weights(weights, files.place(url), "clip-jax")
    again = read_weights(files.place(url))
    assert again.config.text.tokenizer == replace(tokenizer, file=f"{url}/tokenizer.json")
    ids = make_tokenizer(again.config.text)("a photo", 12)
    np.testing.assert_array_equal(ids, make_tokenizer(text)("a photo", 12))
    keep(again.config.text.tokenizer, str(tmp_path / "run"))  # as a run that is given it does
    assert (tmp_path / "run/tokenizer.json").read_bytes() == words.read_bytes()
