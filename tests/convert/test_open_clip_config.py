"""Settings of open_clip's tokenizers: followed, or refused by name."""

import json

import pytest

from clip_jax.convert.open_clip_config import read_config, text_cfg
from clip_jax.errors import InputError
from tests import vocabularies

PATH = "open_clip_config.json"


def read(path, **text):
    tower = {"context_length": 8, "layers": 1, "pool_type": "last", "no_causal_mask": True, **text}
    vision = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16}
    content = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": tower}
    (path / PATH).write_text(json.dumps({"model_cfg": content}))
    return read_config(path / PATH)[0].text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hf_tokenizer_name": "x", "tokenizer_mode": "clips"}, "tokenizer_mode='clips'"),
        ({"tokenizer_kwargs": {"reduction_mask": "simple"}}, "reduction_mask='simple'"),
        ({"tokenizer_kwargs": {"strip_sep_token": True}}, "strip_sep_token=True"),
        ({"hf_tokenizer_name": "x", "tokenizer_kwargs": {"language": "en"}}, "language='en'"),
        ({"tokenizer_kwargs": {"clean": None}}, "clean is None"),
    ],
)
def test_what_is_refused(tmp_path, settings, says):
    with pytest.raises(InputError) as error:
        read(tmp_path, **settings)
    assert says in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_mode": "clips"},  # read with hf_tokenizer_name alone
        {"tokenizer_kwargs": {"reduction_mask": ""}},
        {"hf_tokenizer_name": "x", "tokenizer_mode": "", "tokenizer_kwargs": {"clean": "lower"}},
    ],
)
def test_what_has_no_effect(tmp_path, settings):
    assert read(tmp_path, **settings).tokenizer.clean == "clip"


@pytest.mark.parametrize("with_files", [True, False])
def test_strip_sep_token(tmp_path, with_files):
    """Each separator becomes 0, those in texts, too, and stays so in the written folder."""
    sep = 102
    if with_files:
        vocabularies.wordpiece(tmp_path / "tokenizer.json")
        (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
        sep = 3
    text = read(tmp_path, hf_tokenizer_name="x", tokenizer_kwargs={"strip_sep_token": True})
    assert (text.tokenizer.end_id, text.tokenizer.zeroed_id) == (0, sep)
    assert text_cfg(text)["tokenizer_kwargs"]["strip_sep_token"] is True
