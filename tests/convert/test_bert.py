"""Special ids of a BERT tower whose folder has no vocabulary."""

from dataclasses import replace
from typing import cast

import pytest

from clip_jax.convert import bert
from clip_jax.convert.settings import Settings
from clip_jax.errors import InputError
from clip_jax.models import zoo
from clip_jax.models.bert import BertConfig

_ARCHITECTURES = {"altclip": "AltCLIP", "chinese_clip": "ChineseCLIP-ViT-B-16"}


def ids(kind, vocab_size, **settings):
    section = Settings({"vocab_size": vocab_size, **settings}, "config.json: text_config")
    fields = section.fields({"vocab_size": ("vocab_size", 1)})
    tower = cast(BertConfig, zoo.get(_ARCHITECTURES[kind]).text)
    rules = bert.ids(section, replace(tower, **fields))
    return rules.begin_id, rules.end_id, rules.pad_id


@pytest.mark.parametrize(
    ("kind", "vocab_size", "settings", "expected"),
    [
        ("altclip", 250_002, {}, (0, 2, 1)),
        ("altclip", 900, {}, (0, 2, 1)),
        ("altclip", 900, {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 1}, (5, 6, 1)),
        ("chinese_clip", 21_128, {}, (101, 102, 0)),
        ("chinese_clip", 21_128, {"pad_token_id": 7, "bos_token_id": 0}, (101, 102, 7)),
        ("chinese_clip", 900, {"pad_token_id": 7}, (None, None, 7)),
        ("chinese_clip", 900, {"bos_token_id": 5, "eos_token_id": 6}, (5, 6, 0)),
    ],
)
def test_ids_are_those_of_the_configuration(kind, vocab_size, settings, expected):
    """The padding id was 0 for each vocabulary of another size than a released one."""
    assert ids(kind, vocab_size, **settings) == expected


@pytest.mark.parametrize("value", [None, -1, 900, "0", True])
def test_an_id_that_is_none_is_refused(value):
    with pytest.raises(InputError, match=r"text_config\.pad_token_id is"):
        ids("altclip", 900, pad_token_id=value)
