"""A sentencepiece model's `tokenizer.json` makes the ids that sentencepiece makes."""

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


def test_another_kind_is_refused(tmp_path):
    file = vocabularies.sentencepiece_model(tmp_path / "words.model", kind="bpe")
    rules = TokenizerConfig(file=str(file), clean="punctuation", end_id=1, pad_id=1)
    with pytest.raises(InputError, match="another kind than unigram"):
        tokenizer_files.write(tmp_path, replace(TEXT, tokenizer=rules), as_json=True)
