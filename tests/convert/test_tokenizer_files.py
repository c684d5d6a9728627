"""A sentencepiece model's `tokenizer.json` makes the ids that sentencepiece makes."""

import json
from dataclasses import replace

import pytest
import tokenizers

from clip_jax.convert import tokenizer_files
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.errors import InputError
from clip_jax.models.text import TextConfig, TokenizerConfig
from tests import vocabularies

TEXTS = [*vocabularies.captions(100), "  a  b ", "Hello, World! it's", "", "ﬁne ½ Å", "日本語 x"]
TEXT = TextConfig(vocab_size=200, context_length=64, pool="last")


@pytest.mark.parametrize("clean", ["punctuation", "canonicalize"])
def test_the_same_ids(tmp_path, clean):
    file = vocabularies.sentencepiece_model(tmp_path / "words.model")
    rules = TokenizerConfig(file=str(file), clean=clean, end_id=1, pad_id=1)
    text = replace(TEXT, tokenizer=rules)
    tokenizer_files.write(tmp_path, text, as_json=True)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = make_tokenizer(text)(TEXTS, 64, True)
    for words, row in zip(TEXTS, ours, strict=True):
        ids = theirs.encode(words).ids
        assert ids == list(row[: len(ids)]), words
        assert set(row[len(ids) :]) <= {1}, words


@pytest.mark.parametrize("lowers", [True, False])
def test_released_siglip2_folders_lower_their_texts(tmp_path, lowers):
    """As in training, although transformers' class for these folders does not."""
    vocabularies.byte_fallback(tmp_path / "tokenizer.json")
    config = {"tokenizer_class": "GemmaTokenizer", "padding_side": "right", "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": lowers}))
    rules = tokenizer_files.read(tmp_path, TEXT, TokenizerConfig(file=""))
    assert rules.clean == ("lower" if lowers else "none")


def test_another_kind_is_refused(tmp_path):
    file = vocabularies.sentencepiece_model(tmp_path / "words.model", kind="bpe")
    rules = TokenizerConfig(file=str(file), clean="punctuation", end_id=1, pad_id=1)
    with pytest.raises(InputError, match="another kind than unigram"):
        tokenizer_files.write(tmp_path, replace(TEXT, tokenizer=rules), as_json=True)
