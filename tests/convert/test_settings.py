"""Foreign configurations with something wrong in them: one message that names the file."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from clip_jax.convert import hugging_face, image_processor, tokenizer_files
from clip_jax.convert.formats import read_weights, write_weights
from clip_jax.convert.open_clip_config import read_config
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.text import TokenizerConfig
from tests import vocabularies
from tests.convert.conftest import make_weights

DEFAULTS = {"clip": "ViT-B-32-quickgelu", "siglip": "ViT-B-16-SigLIP"}  # model type → architecture


@pytest.mark.parametrize("family", hugging_face.FAMILIES, ids=lambda family: family.model_type)
def test_settings_that_a_file_leaves_out_are_those_of_a_known_model(family):
    """CLIP's tokenizer alone does not come with the weights. See also tests/reference."""
    name = family.model_type
    config = family.read({"model_type": name}, Path("config.json"))
    assert config.text.tokenizer.file == ("clip" if name == "clip" else "")
    if name in DEFAULTS:
        text = replace(config.text, tokenizer=TokenizerConfig())
        expected = zoo.get(DEFAULTS[name])
        assert (config.vision, text) == (expected.vision, expected.text)
        assert config.embed_dim == expected.embed_dim


WRONG = [
    None, True, "x", -1, 0, 1.5, 10**400, float("nan"), float("inf"),
    [], [1, 2], [[1]], {}, {"a": 1},
]  # fmt: skip


def variants(value):
    """JSON with each value wrong in turn, containers too; of long lists the first."""
    yield from WRONG
    if isinstance(value, dict):
        for key in list(value)[:10]:
            yield from (value | {key: changed} for changed in variants(value[key]))
    elif isinstance(value, list) and value:
        yield from ([changed, *value[1:]] for changed in variants(value[0]))


@pytest.mark.parametrize(
    ("name", "to", "file"),
    [
        ("vit", "hugging-face", "config.json"),
        ("eos", "hugging-face", "preprocessor_config.json"),
        ("own words", "hugging-face", "tokenizer.json"),
        ("own words", "hugging-face", "tokenizer_config.json"),
        ("eos", "open-clip", "open_clip_config.json"),
    ],
)
def test_every_value_wrong_in_turn(tmp_path, name, to, file):
    """It is read all the same, or the refusal says in few words which file is wrong."""
    weights = make_weights("eos" if name == "own words" else name)
    if name == "own words":
        words = vocabularies.byte_fallback(tmp_path / "words.json")
        rules = TokenizerConfig(file=str(words), clean="lower", begin_id=2, end_id=1, pad_id=0)
        text = replace(weights.config.text, tokenizer=rules)
        weights = replace(weights, config=replace(weights.config, text=text))
    write_weights(weights, tmp_path, to)
    text = weights.config.text
    path = tmp_path / file
    read = {  # what reads the file, and no more of the folder, which would take long
        "preprocessor_config.json": lambda: image_processor.read(tmp_path, 32),
        "open_clip_config.json": lambda: read_config(path),
        "config.json": lambda: read_weights(tmp_path),
    }.get(file, lambda: tokenizer_files.read(tmp_path, text, TokenizerConfig()))
    if file == "config.json":
        (tmp_path / "tokenizer.json").unlink()
    # A vocabulary is the library's to read: every third.
    step = 3 if file == "tokenizer.json" else 1
    refusals = []
    for content in itertools.islice(variants(json.loads(path.read_text())), 0, None, step):
        path.write_text(json.dumps(content))
        try:
            read()
        except InputError as error:
            refusals.append(str(error))
    assert refusals
    for message in refusals:
        assert str(tmp_path) in message
        assert len(message) < 2000


def test_a_template_of_many_ids(tmp_path):
    """A list of ids named often: 900 million from a few kilobytes."""
    path = vocabularies.wordpiece(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    template = content["post_processor"]
    template["special_tokens"]["[CLS]"] |= {"ids": [2] * 30_000, "tokens": ["[CLS]"] * 30_000}
    template["single"] = template["single"][:1] * 30_000 + template["single"][1:2]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="adds 900000000 special tokens to a text"):
        tokenizer_files.read(tmp_path, make_weights("vit").config.text, TokenizerConfig())


def test_sizes_beyond_reason_take_no_memory(tmp_path):
    write_weights(make_weights("vit"), tmp_path, "hugging-face")
    path = tmp_path / "config.json"
    content = path.read_text()
    for section, name in [
        ("vision_config", "image_size"),
        ("vision_config", "num_hidden_layers"),
        ("text_config", "max_position_embeddings"),
        ("text_config", "vocab_size"),
    ]:
        changed = json.loads(content)
        changed[section][name] = 1 << 22
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=r"does not fit the archit|must be at least \d and at"):
            read_weights(tmp_path)
