"""A vocabulary of one's own, from the captions of a source, taken by a model's text tower."""

import json

import pytest

from clip_jax.cli.commands import main
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.models.text import TextConfig, TokenizerConfig
from clip_jax.prepare.layout import PrepareConfig
from clip_jax.prepare.writer import vocabulary
from tests.data.conftest import FORMATS
from tests.prepare.conftest import encoded
from tests.vocabularies import captions

TEXTS = captions(60)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    pairs = [(f"{i:02d}.png", encoded(2, 2), text) for i, text in enumerate(TEXTS)]
    return FORMATS["tar"](tmp_path / "source", pairs).path


def test_a_vocabulary_is_trained_and_taken(source, tmp_path, capsys):
    path = tmp_path / "out" / "words.json"
    args = ["prepare", source, "--vocabulary", str(path), "--vocabulary-size", "300", "--json"]
    assert main(args) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ids"] == 300
    assert result["captions"] == len(TEXTS)
    flags = dict(zip(*[iter(result["flags"].split())] * 2, strict=True))
    rules = TokenizerConfig(file=str(path), clean="lower", end_id=1, pad_id=0)
    for name in ("file", "clean", "end-id", "pad-id"):
        value = getattr(rules, name.replace("-", "_"))
        assert flags.pop(f"--model.text.tokenizer.{name}") == str(value)
    names = ("vocab-size", "pool", "eos-token-id")
    assert [flags.pop(f"--model.text.{name}") for name in names] == ["300", "eos", "1"]
    assert not flags
    text = TextConfig(vocab_size=300, pool="eos", eos_token_id=1, tokenizer=rules)
    tokenizer, texts = make_tokenizer(text), [*TEXTS, "ᚠᛇᚻ <0x41> never seen"]
    ids = tokenizer(texts, 120)
    assert ((ids == 1).sum(axis=1) == 1).all()
    assert (ids != 3).all()  # no word is unknown: letters fall into bytes
    for row, said in zip(ids, texts, strict=True):
        assert tokenizer.decode(row) == said.lower()


def test_sizes_that_have_no_room(source, tmp_path):
    with pytest.raises(ValueError, match="vocabulary_size=260"):
        PrepareConfig(source=source, vocabulary=str(tmp_path / "x"), vocabulary_size=260)
    config = PrepareConfig(source=source, vocabulary=str(tmp_path / "x"), vocabulary_size=261)
    assert vocabulary(config)["ids"] >= 260
