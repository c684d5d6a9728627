"""Token ids of vocabularies that are not CLIP's: equal to `SiglipTokenizer`'s, `Siglip2Tokenizer`'s
and open_clip's `HFTokenizer`'s, over generated Unicode; and what a wrong rule would give."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from clip_jax.convert import tokenizer_files
from clip_jax.convert.open_clip_config import read_config, write_tokenizer
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
many = settings(
    derandomize=True, deadline=None, max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function: the folder of a kind of vocabulary with its `tokenizer_config.json`."""

    def make(kind, **config):
        path = tmp_path_factory.mktemp(kind)
        if kind == "siglip":
            vocabularies.sentencepiece_model(path / "spiece.model")
        else:
            getattr(vocabularies, kind)(path / "tokenizer.json")
        (path / "tokenizer_config.json").write_text(json.dumps(config))
        return path

    return make


def theirs(path, kind=None):
    """A tokenizer of transformers as a function of texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizers = getattr(transformers, kind or "AutoTokenizer")
        tokenizer = tokenizers.from_pretrained(path, local_files_only=True)

    def ids(texts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tokenizer(
                texts, padding="max_length", max_length=LENGTH, truncation=True,
                return_tensors="np",
            )["input_ids"]  # fmt: skip

    return ids


def ours(config):
    tokenizer = make_tokenizer(replace(TEXT, tokenizer=config))
    return lambda texts: tokenizer(texts, LENGTH, True)


SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}


@pytest.mark.parametrize(
    ("kind", "cls", "options", "rules", "mistakes"),
    [
        (
            "siglip", "SiglipTokenizer", {}, ("punctuation", None, 1, 1, "right"),
            [{"clean": "lower"}, {"pad_id": 0}, {"end_id": 2}, {"clean": "canonicalize"}],
        ),
        (  # whose class pads left where the folder says nothing
            "byte_fallback", "Siglip2Tokenizer", SPECIAL, ("lower", None, 1, 0, "left"),
            [{"clean": "none"}, {"clean": "canonicalize"}, {"begin_id": 2}, {"pad_side": "right"}],
        ),
        (
            "byte_fallback", "Siglip2Tokenizer", SPECIAL | {"padding_side": "right"},
            ("lower", None, 1, 0, "right"), [{"pad_side": "left"}],
        ),
    ],
)  # fmt: skip
def test_transformers(folder, kind, cls, options, rules, mistakes):
    path = folder(kind, tokenizer_class=cls, **options)
    config = tokenizer_files.read(path, TEXT, UNKNOWN)
    assert rules == (
        config.clean, config.begin_id, config.end_id, config.pad_id, config.pad_side
    )  # fmt: skip
    reference, own = theirs(path, cls), ours(config)

    @many
    @example(["", " ", "A Photo, of: the CAT!", "two_words", "猫 ΑΣ", "x " * 40])
    @given_texts
    def check(texts):
        np.testing.assert_array_equal(own(texts), reference(texts))

    check()
    text = ["A two_words, photo!"]
    for mistake in mistakes:
        assert (ours(replace(config, **mistake))(text) != reference(text)).any(), mistake


OPEN_CLIP = {
    "siglip": ({"tokenizer_class": "SiglipTokenizer"}, ["canonicalize"]),
    "byte_fallback": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"},
        ["canonicalize", "lower"],
    ),
    "wordpiece": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"},
        ["whitespace", "lower"],
    ),
    "unigram": (
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"},
        ["whitespace", "canonicalize"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "clean"),
    [(kind, clean) for kind, (_, cleans) in OPEN_CLIP.items() for clean in cleans],
)
def test_open_clip(open_clip, folder, kind, clean):
    """Its `HFTokenizer`, from a folder in, and from one that we write."""
    path = folder(kind, **OPEN_CLIP[kind][0])
    content = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": LENGTH, "vocab_size": 1_000, "width": 64, "heads": 1, "layers": 1,
            "hf_tokenizer_name": "toy", "tokenizer_kwargs": {"clean": clean},
            "pool_type": "last",
        },
    }  # fmt: skip
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": content}))
    config, _ = read_config(path / "open_clip_config.json")
    own = ours(config.text.tokenizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = open_clip.get_tokenizer(f"local-dir:{path}")
        again = path / "again"
        again.mkdir()
        write_tokenizer(again, config.text)
        (again / "open_clip_config.json").write_text(json.dumps({"model_cfg": content}))
        written = open_clip.get_tokenizer(f"local-dir:{again}")

    @many
    @example(["", "A two_words, photo! &amp; Ünïcödé", "schÃ¶n 猫", "x " * 40])
    @given_texts
    def check(texts):
        ids = own(texts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(ids, reference(texts).numpy())
            np.testing.assert_array_equal(ids, written(texts).numpy())

    check()


@pytest.mark.parametrize(
    ("kind", "clean", "side"),
    [
        ("byte_fallback", "none", "left"),
        ("byte_fallback", "canonicalize", "right"),
        ("byte_fallback", "clip", "left"),
        ("wordpiece", "lower", "right"),
        ("wordpiece", "punctuation", "left"),
        ("unigram", "whitespace", "right"),
        ("unigram", "clip", "right"),
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
    texts = [
        "",
        "A two_words, photo!",
        "Ünïcödé  naïve\tcafé 42",
        "x " * 40,
        *vocabularies.captions(20),
    ]
    texts = [text.replace("<b>", "") for text in texts]
    expected = ours(config)(texts)
    np.testing.assert_array_equal(theirs(tmp_path)(texts), expected)
    again = tokenizer_files.read(tmp_path, TEXT, UNKNOWN)
    np.testing.assert_array_equal(ours(again)(texts), expected)
