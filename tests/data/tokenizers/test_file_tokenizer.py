"""Tokenizers from files: the rules of each kind, and files that are not valid."""

import base64
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data.tokenizers import make_tokenizer, read_captions, vocabulary
from clip_jax.data.tokenizers.clean import CLEANING
from clip_jax.errors import InputError
from clip_jax.models.text import TextConfig, TokenizerConfig
from tests import vocabularies

TEXT = TextConfig(context_length=8, vocab_size=1_000, width=8, num_heads=1, pool="last")
KINDS = {
    "sentencepiece_model": "tokenizer.model",
    "byte_fallback": "tokenizer.json",
    "wordpiece": "tokenizer.json",
    "unigram": "tokenizer.json",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return {kind: str(getattr(vocabularies, kind)(folder / kind)) for kind in KINDS}


def make(**rules):
    return make_tokenizer(replace(TEXT, tokenizer=TokenizerConfig(**rules)))


RULES = st.fixed_dictionaries(
    {
        "begin_id": st.sampled_from([None, 2]),
        "end_id": st.sampled_from([None, 1]),
        "pad_id": st.sampled_from([0, 3]),
        "zeroed_id": st.sampled_from([None, 1, 9]),
        "pad_side": st.sampled_from(["right", "left"]),
        "cut": st.sampled_from(["keep_end", "drop_end"]),
        "clean": st.sampled_from(["none", "lower", "canonicalize"]),
    }
)
TEXTS = st.lists(st.sampled_from(vocabularies.captions(40)) | st.text(max_size=9), max_size=3)


@given(kind=st.sampled_from([*KINDS]), rules=RULES, texts=TEXTS, length=st.integers(0, 20))
def test_begin_end_padding_and_cut(files, kind, rules, texts, length):
    """A batch has the ids of each text alone, with the rules applied in order."""
    tokenizer = make(file=files[kind], **rules)
    begin, end = ([rules[name]] * (rules[name] is not None) for name in ("begin_id", "end_id"))
    if length < len(begin) + len(end):
        with pytest.raises(InputError, match="cannot hold begin and end"):
            tokenizer(texts, length)
        return
    rows = tokenizer(texts, length, truncate=True)
    assert rows.shape == (len(texts), length)
    for text, row in zip(texts, rows, strict=True):
        (words,) = tokenizer._encode([CLEANING[rules["clean"]](text)])
        expected = [*begin, *words, *end]
        tokenizer(text, len(expected))  # fits exactly
        if (extra := len(expected) - length) > 0:
            with pytest.raises(InputError, match=f"has more than context_length={length} ids"):
                tokenizer(text, length)
            keeps = rules["cut"] == "keep_end"
            expected = [*begin, *words[:-extra], *end] if keeps else expected[:length]
        else:
            fill = [rules["pad_id"]] * -extra
            expected = [*expected, *fill] if rules["pad_side"] == "right" else [*fill, *expected]
        assert row.tolist() == [0 if i == rules["zeroed_id"] else i for i in expected]


LETTERS = st.characters(exclude_categories=("Cs",), exclude_characters="▁")  # it is a space there


@given(text=st.text(LETTERS, max_size=20) | st.sampled_from(vocabularies.captions(40)))
def test_any_text_comes_back_from_bytes(files, text):
    """If unknown characters are encoded as bytes, and no special token has the id of a byte."""
    tokenizer = make(file=files["byte_fallback"], clean="none", begin_id=2, end_id=1, pad_id=0)
    ids = tokenizer([text], 8 * len(text) + 9)
    assert tokenizer.decode(ids[0]) == text


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_back_and_tokenizers_travel(files, kind):
    """Through a pickle that holds the rules alone, as to the processes that read data."""
    tokenizer = make(file=files[kind], clean="lower", begin_id=2, end_id=1, pad_id=0)
    ids = tokenizer(["a photo of the cat", ""], 40)
    assert tokenizer.decode(ids[0]) == "a photo of the cat"
    data = pickle.dumps(tokenizer)
    assert len(data) < 1_000
    np.testing.assert_array_equal(pickle.loads(data)(["a photo of the cat", ""], 40), ids)


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_caption_ends_at_its_end_or_at_padding(files, kind):
    rules = TokenizerConfig(file=files[kind], clean="lower", begin_id=2, end_id=1, pad_id=3)
    text = replace(TEXT, tokenizer=rules)
    for caption in ("a photo", "photo of a cat"):
        (ids,) = make_tokenizer(text)(caption, 40)
        without_end = np.where(ids == 1, 3, ids)
        without_end[-1] = ids[1]  # a decoder goes on
        assert read_captions(np.stack([ids, without_end]), text) == [caption, caption]


def test_cleaning():
    text = "A two_words,  PHOTO! &amp;amp; schÃ¶n\tΑΣ"
    cleaned = {name: rule(text) for name, rule in CLEANING.items()}
    assert cleaned == {
        "none": text,
        "lower": "a two_words,  photo! &amp;amp; schã¶n\tασ",  # letter by letter
        "whitespace": "A two_words, PHOTO! & schön ΑΣ",
        "punctuation": "a twowords photo ampamp schã¶n ας",
        "canonicalize": "a two words photo schön ας",
        "clip": "a two_words, photo! & schön ας",
    }
    assert CLEANING["clip"]("a < b &amp;amp; c") == "a < b & c"  # by us alone: ftfy leaves it


@pytest.mark.parametrize(
    ("text", "rules", "match"),
    [
        ({"vocab_size": 50}, {}, r"has \d+ ids, more than text.vocab_size=50"),
        ({"pool": "argmax"}, {}, "text.pool='argmax' needs the highest id as the end"),
        ({"pool": "eos", "eos_token_id": 7}, {}, "eos_token_id=7 is not text.tokenizer.end_id=1"),
        ({}, {"begin_id": 5_000}, "text.tokenizer.begin_id=5000 is not an id of"),
        ({}, {"pad_id": 9_999}, "text.tokenizer.pad_id=9999 is not an id of"),
        ({}, {"file": ""}, "weights came without its vocabulary"),
        ({}, {"file": "nowhere.json"}, "nowhere.json cannot be read"),
    ],
)
def test_rules_that_would_be_wrong_in_silence(files, text, rules, match):
    config = TokenizerConfig(**{"file": files["unigram"], "end_id": 1, **rules})
    with pytest.raises(ValueError, match=match):
        make_tokenizer(replace(TEXT, **text, tokenizer=config))


def of_model(**model):
    return json.dumps({"model": model}).encode()


NO_VOCABULARIES = {
    "text": b"no vocabulary at all",
    "nothing": b"",
    "another JSON": b'{"a": 1}',
    "deep": b'{"a":' * 100_000,
    "ids beyond any table": of_model(type="BPE", vocab={"a": 4_294_967_295}, merges=[]),
    "merges of other words": of_model(type="BPE", vocab={"a": 0, "b": 1}, merges=["a c"]),
    "an unknown word that is none": of_model(type="Unigram", unk_id=7, vocab=[["a", 0.0]]),
    "bytes that are not UTF-8": b'{"\xff\xfe": 1}',
}


@pytest.mark.parametrize("name", NO_VOCABULARIES)
def test_files_that_are_no_vocabulary(tmp_path, name):
    path = tmp_path / "words"
    path.write_bytes(NO_VOCABULARIES[name])
    with pytest.raises(InputError, match="words") as error:
        make(file=str(path))
    assert len(str(error.value)) < 600


def test_a_sentencepiece_model_with_damage(tmp_path, files):
    """Truncated or flipped: read or refused, at once and without harm."""
    whole = vocabulary.read_vocabulary(files["sentencepiece_model"])
    rng = np.random.default_rng(0)
    refused = 0
    for i, at in enumerate(rng.integers(1, len(whole), 30)):
        path = tmp_path / f"{i}.model"
        path.write_bytes(whole[:at] if i % 2 else whole[:at] + b"\xff" * 8 + whole[at + 8 :])
        try:
            make(file=str(path))("a photo", 8, True)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)  # noqa: PT017
    assert refused > 5


def test_a_prefix_that_would_end_the_process(tmp_path, files):
    """The library panics at a BPE whose prefix is cut from within a letter, and aborts."""
    content = json.loads(Path(files["byte_fallback"]).read_text())
    content["model"]["continuing_subword_prefix"] = "#"
    path = tmp_path / "words"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"model\.continuing_subword_prefix is not supported"):
        make_tokenizer(replace(TEXT, tokenizer=TokenizerConfig(file=str(path))))


def test_size_is_bounded_before_it_is_read(tmp_path):
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ValueError, match="bytes, more than any vocabulary"):
        make(file=str(path))


def test_only_regular_files_are_read(tmp_path):
    """A pipe would wait for ever, and a device fill the memory."""
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name in ("pipe.json", "zero.json"):
        with pytest.raises(
            InputError, match=f"{name} cannot be read .a folder, a pipe or a device"
        ):
            make(file=str(tmp_path / name))


def replaced(pattern, content):
    return {"type": "Replace", "pattern": pattern, "content": content}


TABLE = base64.b64encode(bytes(4) + b"a" * 20_000).decode()  # of no letters, and one long text
BOMBS = {
    "each letter by two": ("normalizer", [replaced({"String": "a"}, "aa")] * 15),
    "between any letters": ("normalizer", [replaced({"Regex": "x*"}, "aa")] * 10),
    "nested": ("decoder", [{"type": "Sequence", "decoders": [replaced({"String": ""}, "a")] * 15}]),
    "a table": ("normalizer", [{"type": "Precompiled", "precompiled_charsmap": TABLE}]),
}


@pytest.mark.parametrize("name", BOMBS)
def test_steps_that_multiply_a_text(tmp_path, files, name):
    part, steps = BOMBS[name]
    content = json.loads(Path(files["wordpiece"]).read_text())
    content[part] = {"type": "Sequence", f"{part}s": steps}
    (tmp_path / "words.json").write_text(json.dumps(content))
    with pytest.raises(
        InputError, match=f"its {part} may make a text more than 16384 times as long"
    ):
        make(file=str(tmp_path / "words.json"))


def test_a_pattern_that_needs_too_many_steps_is_one_message(tmp_path, files):
    """The library panics, which is no Exception, when it has tried long enough."""
    content = json.loads(Path(files["wordpiece"]).read_text())
    content["normalizer"] = replaced({"Regex": "(a+)+$"}, "a")
    (tmp_path / "words.json").write_text(json.dumps(content))
    tokenizer = make(file=str(tmp_path / "words.json"))
    with pytest.raises(
        InputError, match=r"words.json is not a valid tokenizer.json: .*retry-limit"
    ):
        tokenizer("a" * 100 + "!", 8, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_kept(tmp_path, files, kind):
    config = TokenizerConfig(file=files[kind])
    assert vocabulary.keep(config, str(tmp_path)) == KINDS[kind]
    assert vocabulary.keep(config, str(tmp_path)) == KINDS[kind]  # again, as at a resumption
    content = (tmp_path / KINDS[kind]).read_bytes()
    assert content == vocabulary.read_vocabulary(files[kind])
    assert vocabulary.keep(TokenizerConfig(), str(tmp_path)) == "clip"
    (tmp_path / KINDS[kind]).write_bytes(content + b" ")
    with pytest.raises(ValueError, match=f"{KINDS[kind]} and .* differ; use another"):
        vocabulary.keep(config, str(tmp_path))
