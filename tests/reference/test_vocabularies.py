"""Token ids of vocabularies that are not CLIP's: equal to `SiglipTokenizer`'s, `Siglip2Tokenizer`'s
and open_clip's `HFTokenizer`'s, over generated Unicode."""

import json
from dataclasses import replace

import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clip_jax.convert import tokenizer_files
from clip_jax.convert.open_clip_config import read_config, text_cfg, write_tokenizer
from clip_jax.data.tokenizers import make_tokenizer
from clip_jax.models.text import TextConfig, TokenizerConfig
from tests import vocabularies

LENGTH = 16
UNKNOWN = TokenizerConfig(file="")
TEXT = TextConfig(
    context_length=LENGTH, vocab_size=1_000, width=8, num_heads=1, pool="last", causal=False
)
TEXTS = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="<>[]"), max_size=40
) | st.lists(st.sampled_from(vocabularies.captions(40)), max_size=3).map(" ".join)
# Markers of a vocabulary in a text are markers to transformers, wherever they come from; hence
# no < and [ among the letters.
given_texts = given(st.lists(TEXTS, min_size=1, max_size=6))
many = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def write_folder(path, kind, **config):
    """Write a vocabulary of a kind with its `tokenizer_config.json`."""
    name = "spiece.model" if kind == "sentencepiece_model" else "tokenizer.json"
    getattr(vocabularies, kind)(path / name)
    (path / "tokenizer_config.json").write_text(json.dumps(config))


def theirs(path, kind="AutoTokenizer"):
    """A tokenizer of transformers as a function of texts."""
    tokenizer = getattr(transformers, kind).from_pretrained(path, local_files_only=True)
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    return lambda texts: tokenizer(texts, return_tensors="np", **options)["input_ids"]


def ours(config):
    tokenizer = make_tokenizer(replace(TEXT, tokenizer=config))
    return lambda texts: tokenizer(texts, LENGTH, True)


SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("kind", "cls", "options", "rules"),
    [
        ("sentencepiece_model", "SiglipTokenizer", {}, ("punctuation", None, 1, 1, "right")),
        # Its class pads left where the folder says nothing.
        ("byte_fallback", "Siglip2Tokenizer", SPECIAL, ("lower", None, 1, 0, "left")),
        (
            "byte_fallback",
            "Siglip2Tokenizer",
            SPECIAL | {"padding_side": "right"},
            ("lower", None, 1, 0, "right"),
        ),
    ],
)
def test_transformers(tmp_path, kind, cls, options, rules):
    write_folder(tmp_path, kind, tokenizer_class=cls, **options)
    config = tokenizer_files.read(tmp_path, TEXT, UNKNOWN)
    names = ("clean", "begin_id", "end_id", "pad_id", "pad_side")
    assert rules == tuple(getattr(config, name) for name in names)
    reference, tokenizer = theirs(tmp_path, cls), ours(config)

    @many
    @example(["", " ", "A Photo, of: the CAT!", "A two_words, photo!", "猫 ΑΣ", "x " * 40])
    @given_texts
    def check(texts):
        np.testing.assert_array_equal(tokenizer(texts), reference(texts))

    check()


FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    ("kind", "size", "megabytes", "cls", "options"),
    [
        ("large_bpe", 256_000, 30, "Siglip2Tokenizer", SPECIAL),
        ("large_unigram", 140_000, 5, "PreTrainedTokenizerFast", {"pad_token": "<pad>"}),
    ],
)
def test_vocabularies_of_gemmas_size_and_of_xlm_vs_kind(
    tmp_path, kind, size, megabytes, cls, options
):
    """From a folder of transformers and to one; files of more than 30 MB were refused."""
    write_folder(tmp_path, kind, tokenizer_class=cls, **options)
    assert (tmp_path / "tokenizer.json").stat().st_size > megabytes * 1e6
    text = replace(TEXT, vocab_size=size)
    text = replace(text, tokenizer=tokenizer_files.read(tmp_path, text, UNKNOWN))
    texts = vocabularies.odd_strings(1_000)
    ids = make_tokenizer(text)(texts, LENGTH, True)
    assert ids.max() > max(size // 2, 2**16)
    np.testing.assert_array_equal(ids, theirs(tmp_path, cls)(texts))
    (tmp_path / "out").mkdir()
    tokenizer_files.write(tmp_path / "out", text)
    np.testing.assert_array_equal(ids, theirs(tmp_path / "out")(texts))


GEMMA = FAST | {"pad_token": "<pad>", "eos_token": "<eos>"}
BERT = FAST | {"pad_token": "[PAD]", "sep_token": "[SEP]", "cls_token": "[CLS]"}


@pytest.mark.parametrize(
    ("kind", "options", "rules"),
    [
        ("sentencepiece_model", {"tokenizer_class": "SiglipTokenizer"}, {"clean": "canonicalize"}),
        ("byte_fallback", GEMMA, {"clean": "canonicalize"}),
        ("byte_fallback", GEMMA, {"clean": "lower"}),
        ("wordpiece", FAST | {"pad_token": "[PAD]"}, {"clean": "whitespace"}),
        ("wordpiece", BERT, {"strip_sep_token": True}),  # CLIPA's
        ("unigram", FAST | {"pad_token": "<pad>"}, {"clean": "whitespace"}),
        ("unigram", FAST | {"pad_token": "<pad>"}, {"clean": "canonicalize"}),
    ],
)
def test_open_clip(open_clip, tmp_path, kind, options, rules):
    """Its `HFTokenizer`, from a folder in, and from one that we write."""
    content = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": LENGTH,
            "vocab_size": 1_000,
            "width": 64,
            "heads": 1,
            "layers": 1,
            "hf_tokenizer_name": "toy",
            "tokenizer_kwargs": rules,
            "pool_type": "last",
        },
    }
    folders = [tmp_path / name for name in ("before", "again")]
    for path in folders:
        path.mkdir()
    (folders[0] / "open_clip_config.json").write_text(json.dumps({"model_cfg": content}))
    write_folder(folders[0], kind, **options)
    config, _ = read_config(folders[0] / "open_clip_config.json")
    write_tokenizer(folders[1], config.text)
    again = {"model_cfg": content | {"text_cfg": text_cfg(config.text)}}
    (folders[1] / "open_clip_config.json").write_text(json.dumps(again))
    tokenizer = ours(config.text.tokenizer)
    reference, written = (open_clip.get_tokenizer(f"local-dir:{path}") for path in folders)

    @many
    @example(["", "A two_words, photo! &amp; Ünïcödé", "schÃ¶n 猫", "x " * 40])
    @given_texts
    def check(texts):
        ids = tokenizer(texts)
        np.testing.assert_array_equal(ids, reference(texts).numpy())
        np.testing.assert_array_equal(ids, written(texts).numpy())

    check()


@pytest.mark.parametrize(
    ("kind", "clean", "side"),
    [
        ("byte_fallback", "none", "left"),
        ("byte_fallback", "clip", "left"),
        ("wordpiece", "lower", "right"),
        ("wordpiece", "punctuation", "left"),
        ("unigram", "whitespace", "right"),
        ("unigram", "canonicalize", "left"),
    ],
)
def test_what_is_written_for_transformers(tmp_path, kind, clean, side):
    """Every rule, in files that `AutoTokenizer` reads; texts with nothing to repair in them."""
    file = getattr(vocabularies, kind)(tmp_path / "words.json")
    config = TokenizerConfig(
        file=str(file), clean=clean, begin_id=2, end_id=1, pad_id=0, pad_side=side
    )
    text = replace(TEXT, tokenizer=config)
    tokenizer_files.write(tmp_path, text)
    texts = ["", "A two_words, photo!", "Ünïcödé  naïve\tcafé 42", "x " * 40]
    texts += [text.replace("<b>", "") for text in vocabularies.captions(20)]
    expected = ours(config)(texts)
    np.testing.assert_array_equal(theirs(tmp_path)(texts), expected)
    again = tokenizer_files.read(tmp_path, TEXT, UNKNOWN)
    np.testing.assert_array_equal(ours(again)(texts), expected)
