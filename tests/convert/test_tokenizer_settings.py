"""Settings of Hugging Face's tokenizer files: followed, without effect, or refused by name.

`tests/reference/test_tokenizer_settings.py` compares the ids with transformers' and open_clip's.
"""

import json
import re

import pytest

from clip_jax.convert import tokenizer_files
from clip_jax.convert.tokenizer_files import write_clip_tokenizer
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
from clip_jax.errors import InputError
from clip_jax.models.text import TextConfig, TokenizerConfig
from tests import vocabularies

TEXT = TextConfig(vocab_size=600, context_length=16, pool="last", causal=False)
CLIP = TextConfig(vocab_size=600, context_length=16)
CONFIG, VOCABULARY = "tokenizer_config.json", "tokenizer.json"
BERT, XLM_R = "BertTokenizer", "XLMRobertaTokenizer"
KINDS = {
    BERT: "wordpiece",
    XLM_R: "unigram",
    "GemmaTokenizer": "byte_fallback",
    "PreTrainedTokenizerFast": "wordpiece",
}


def change(path, names, value):
    content = json.loads(path.read_text()) if path.exists() else {}
    *parents, last = names.split("/")
    section = content
    for name in parents:
        section = section[name]
    section[last] = value
    path.write_text(json.dumps(content))


def folder_of(path, kind):
    """A folder of a class, with a `tokenizer.json` that fits it."""
    getattr(vocabularies, KINDS[kind])(path / VOCABULARY)
    change(path / CONFIG, "tokenizer_class", kind)
    if kind == XLM_R:
        change(path / VOCABULARY, "normalizer", None)
    return path


def read(path):
    return tokenizer_files.read(path, TEXT, TokenizerConfig(file=""))


LEFT = {"direction": "Left", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 9},
    "direction": "Left",
    "pad_to_multiple_of": None,
    "pad_id": 4,
    "pad_type_id": 0,
    "pad_token": "[MASK]",
}


@pytest.mark.parametrize(
    ("kind", "file", "names", "value", "field", "expected"),
    [
        (BERT, CONFIG, "cls_token", "[MASK]", "begin_id", 4),
        (BERT, CONFIG, "sep_token", "[MASK]", "end_id", 4),
        (BERT, CONFIG, "bos_token", "[MASK]", "begin_id", 2),
        (BERT, VOCABULARY, "post_processor", None, "begin_id", 2),
        (BERT, VOCABULARY, "padding", PADDING, "pad_side", "left"),
        (BERT, VOCABULARY, "padding", PADDING, "pad_id", 4),
        (BERT, CONFIG, "add_bos_token", True, "begin_id", 2),
        (BERT, "special_tokens_map.json", "pad_token", "[MASK]", "pad_id", 4),
        (XLM_R, CONFIG, "bos_token", "</s>", "begin_id", 2),
        (XLM_R, CONFIG, "cls_token", "</s>", "begin_id", 0),
        ("GemmaTokenizer", CONFIG, "add_eos_token", False, "end_id", 1),
        ("GemmaTokenizer", CONFIG, "legacy", False, "pad_side", "left"),
        ("GemmaTokenizer", "config.json", "model_type", "siglip2", "clean", "lower"),
        ("PreTrainedTokenizerFast", CONFIG, "do_lower_case", False, "clean", "none"),
    ],
)
def test_what_is_followed(tmp_path, kind, file, names, value, field, expected):
    """As by transformers' class; ids differ otherwise."""
    folder = folder_of(tmp_path, kind)
    change(folder / file, names, value)
    assert getattr(read(folder), field) == expected


@pytest.mark.parametrize(
    ("kind", "file", "names", "value", "says"),
    [
        (BERT, CONFIG, "do_lower_case", False, "do_lower_case=False differs"),
        (BERT, CONFIG, "strip_accents", False, "strip_accents=False differs"),
        (BERT, CONFIG, "tokenize_chinese_chars", False, "tokenize_chinese_chars=False differs"),
        (BERT, VOCABULARY, "normalizer/lowercase", False, "has lowercase=False"),
        (BERT, VOCABULARY, "pre_tokenizer", None, "pre_tokenizer=None is not that of BertTok"),
        (BERT, VOCABULARY, "model/max_input_chars_per_word", 9, "model.max_input_chars_per_word=9"),
        (BERT, VOCABULARY, "truncation", LEFT, "truncation_side='left'"),
        (BERT, CONFIG, "truncation_side", "left", "truncation_side='left'"),
        (BERT, CONFIG, "padding_side", None, "padding_side is None"),
        (BERT, CONFIG, "cls_token", None, "cls_token is null"),
        (BERT, CONFIG, "pad_token", None, "pad_token is null"),
        (BERT, CONFIG, "cls_token", "cat", "cls_token='cat'"),
        (BERT, CONFIG, "unk_token", "[MASK]", "unk_token='[MASK]' differs"),
        (BERT, CONFIG, "image_token", "cat", "image_token='cat'"),
        (BERT, CONFIG, "extra_special_tokens", ["cat"], "extra_special_tokens='cat'"),
        (BERT, CONFIG, "extra_special_tokens", {"a_token": "cat"}, "extra_special_tokens='cat'"),
        (BERT, CONFIG, "added_tokens_decoder", {"7": {"content": "cat"}}, "decoder='cat'"),
        (BERT, CONFIG, "added_tokens_decoder", {"2": {"content": "[CLS]", "lstrip": True}}, "CLS"),
        (BERT, CONFIG, "added_tokens_decoder", [{"content": "[CLS]"}], "added_tokens_decoder is ["),
        (BERT, CONFIG, "added_tokens_decoder", {"2": "[CLS]"}, "added_tokens_decoder is {"),
        (BERT, CONFIG, "extra_special_tokens", 5, "extra_special_tokens is 5"),
        (BERT, CONFIG, "extra_special_tokens", [5], "extra_special_tokens is 5"),
        (BERT, "added_tokens.json", "cat", 7, "added_tokens.json='cat'"),
        (BERT, "special_tokens_map.json", "mask_token", "cat", "mask_token='cat'"),
        (BERT, CONFIG, "split_special_tokens", True, "split_special_tokens=True"),
        (BERT, CONFIG, "fast_tokenizer_files", ["tokenizer.4.json"], "fast_tokenizer_files=['tok"),
        (BERT, CONFIG, "tokenizer_class", "LlamaTokenizer", "tokenizer_class='LlamaTokenizer'"),
        (BERT, CONFIG, "tokenizer_class", "SiglipTokenizer", "needs spiece.model"),
        (XLM_R, CONFIG, "add_prefix_space", False, "add_prefix_space=False"),
        (XLM_R, VOCABULARY, "normalizer", {"type": "Lowercase"}, "normalizer='Lowercase'"),
        ("GemmaTokenizer", VOCABULARY, "model/byte_fallback", False, "model.byte_fallback=False"),
        ("GemmaTokenizer", VOCABULARY, "model/dropout", 0.5, "model.dropout=0.5"),
    ],
)
def test_what_is_refused(tmp_path, kind, file, names, value, says):
    """It changes the ids of transformers, and did so in silence."""
    folder = folder_of(tmp_path, kind)
    change(folder / file, names, value)
    with pytest.raises(InputError) as error:
        read(folder)
    assert says in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("names", "value", "says"),
    [
        ("do_lower_case", False, "do_lower_case=False"),
        ("sp_model_kwargs", {"enable_sampling": True}, "sp_model_kwargs={'enable_sampling': True}"),
        ("bos_token", "cat", "bos_token='cat'"),
        ("pad_token", "cat", "pad_token='cat'"),
        ("eos_token", None, "eos_token=None"),
    ],
)
def test_settings_of_a_sentencepiece_model(tmp_path, names, value, says):
    vocabularies.sentencepiece_model(tmp_path / "spiece.model")
    change(tmp_path / CONFIG, "tokenizer_class", "SiglipTokenizer")
    assert read(tmp_path).end_id == 1
    change(tmp_path / CONFIG, names, value)
    with pytest.raises(InputError, match=re.escape(says)):
        read(tmp_path)


# ------------------------------------------------------------------ CLIP's folders


def read_clip(path):
    return tokenizer_files.read(path, CLIP, TokenizerConfig())


def write_words(path, merges):
    """The older files of OpenAI's vocabulary."""
    (path / "vocab.json").write_text(json.dumps(ClipTokenizer(600).vocab))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (path / "merges.txt").write_text("\n".join(lines) + "\n")


def test_openais_words_in_two_files(tmp_path):
    write_words(tmp_path, ClipTokenizer(600).merges)
    assert read_clip(tmp_path) == TokenizerConfig()


def test_words_of_its_own_are_not_replaced(tmp_path):
    """A folder got OpenAI's vocabulary."""
    write_words(tmp_path, ClipTokenizer(600).merges[::-1])
    with pytest.raises(InputError, match=r"vocabulary of its own \(vocab.json, merges.txt\)"):
        read_clip(tmp_path)


@pytest.mark.parametrize("name", ["vocab.txt", "sentencepiece.bpe.model", "spiece.model"])
def test_another_vocabulary_is_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("[PAD]\n[UNK]\n")
    with pytest.raises(InputError, match=rf"\({re.escape(name)}\) and no tokenizer.json"):
        read_clip(tmp_path)
    assert read(tmp_path).file == ""  # of other models: --tokenizer


@pytest.mark.parametrize(
    ("file", "names", "value", "says"),
    [
        (CONFIG, "truncation_side", "left", "truncation_side='left'"),
        (CONFIG, "padding_side", "left", "padding_side='left'"),
        (CONFIG, "bos_token", "!", "bos_token='!'"),
        (CONFIG, "pad_token", "cat", "pad_token='cat'"),
        (CONFIG, "extra_special_tokens", ["<cat-toy>"], "extra_special_tokens='<cat-toy>'"),
        (CONFIG, "split_special_tokens", True, "split_special_tokens=True"),
        (CONFIG, "tokenizer_class", "BertTokenizer", "is not that of CLIPTokenizer"),
        (VOCABULARY, "truncation", LEFT, "truncation_side='left'"),
        (VOCABULARY, "padding", PADDING, "padding_side='left'"),
    ],
)
def test_settings_of_openais_words(tmp_path, file, names, value, says):
    """OpenAI's rules were taken, whatever the settings."""
    write_clip_tokenizer(tmp_path, CLIP)
    assert read_clip(tmp_path) == TokenizerConfig()
    change(tmp_path / CONFIG, "pad_token", "!")  # of stabilityai's text towers
    assert read_clip(tmp_path) == TokenizerConfig()
    if names == "tokenizer_class":
        value = "PreTrainedTokenizerFast"
        change(tmp_path / VOCABULARY, "normalizer", None)
    change(tmp_path / file, names, value)
    with pytest.raises(InputError, match=re.escape(says)):
        read_clip(tmp_path)


def test_zeroed_ids_are_0_everywhere(tmp_path):
    """A separator in the text, too, and not the last one alone."""
    file = vocabularies.wordpiece(tmp_path / VOCABULARY)
    rules = TokenizerConfig(file=str(file), clean="none", begin_id=2, end_id=3, zeroed_id=3)
    text = TextConfig(vocab_size=600, context_length=8, pool="last", tokenizer=rules)
    ids = make_tokenizer(text)(["a [SEP] cat"], 8)[0]
    assert 3 not in ids
    assert list(ids).count(0) == list(ids)[1:].count(0)
