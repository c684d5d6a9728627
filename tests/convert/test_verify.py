"""What `convert --verify` compares, and what it does where there is nothing to compare with.

tests/reference/test_verify.py has the comparisons with each library.
"""

import importlib.util
import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from clip_jax.cli.commands import main
from clip_jax.convert import verify
from clip_jax.convert.formats import write_weights
from clip_jax.convert.verify import (
    TEXTS,
    Reference,
    Verification,
    Verifications,
    relative_difference,
)
from clip_jax.data.tokenizers import make_tokenizer
from tests.convert.conftest import make_weights


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"pixels": 0.0, "texts_with_other_ids": 0}, ()),
        ({"image_features": 0.1, "logits": 0.1}, ("image tower",)),
        ({"text_features": np.nan, "logits": np.nan}, ("text tower",)),
        ({"logits": 2e-5}, ("logit scale or bias",)),
        ({"pixels": 2e-5}, ("preprocessing",)),
        ({"pixels": 2e-5, "pixel_bound": 0.01}, ()),
        ({"texts_with_other_ids": 1}, ("token ids",)),
    ],
)
def test_where_a_difference_arises(values, parts):
    fine = {"image_features": 1e-7, "text_features": 1e-7, "logits": 1e-7}
    verification = Verification(reference="other 1.0", model="source", **fine | values)
    assert verification.differing == parts
    assert verification.passed is (not parts)
    both = Verifications((Verification(reference="clip_jax", model="result", **fine), verification))
    assert both.passed is (not parts)
    for part in parts:
        assert f"{part}: other 1.0 loads the source" in both.describe()


def test_a_report_has_each_comparison_and_what_was_not_compared():
    fine = {"image_features": 1e-7, "texts_with_other_ids": 0, "not_compared": ("pixels: none",)}
    made = Verification(reference="other 1.0", model="source", **fine)
    lines = Verifications((made,), ("result: no library",)).describe().splitlines()
    assert lines[0].split() == ["library", "loads", "the", "token", "ids", "image", "tower"]
    assert lines[2].split() == ["other", "1.0", "source", "equal", "1e-07"]
    assert lines[3:] == [
        "not compared             result: no library",
        "not compared             source: pixels: none",
    ]


def test_relative_differences_of_zeros():
    zero, one = np.zeros(3), np.ones(3)
    assert relative_difference(zero, zero) == 0
    assert relative_difference(one, zero) == math.inf
    assert relative_difference(2 * one, one) == 1
    assert math.isnan(relative_difference(zero, np.full(3, np.nan)))


def test_padding_that_a_model_does_not_see_may_differ():
    weights = make_weights("vit")
    text = weights.config.text
    end = text.end_id or 0
    ours = np.array(make_tokenizer(text)(list(TEXTS), text.context_length, True))
    is_after = np.cumsum(ours == end, axis=1) - (ours == end) > 0
    assert is_after.any()

    def count(ids, text=text):
        reference = Reference(name="", outputs=dict, tokenize=lambda _: ids)
        return verify._token_ids(reference, text)[1]

    assert count(np.where(is_after, end, ours)) == 0
    assert count(np.where(is_after, ours, ours + 1)) == len(TEXTS)
    assert count(ours[:, :-1]) == len(TEXTS)
    seen = replace(text, causal=False, pool="last")
    assert count(np.where(is_after, end, ours), seen) == is_after.any(axis=1).sum()


def test_without_any_library(tmp_path, capsys, monkeypatch):
    """The error says what to install, although the model is written."""
    write_weights(make_weights("vit"), tmp_path / "in", "hugging-face")
    find_spec = importlib.util.find_spec
    without = mock.create_autospec(
        find_spec, side_effect=lambda name: None if name == "transformers" else find_spec(name)
    )
    monkeypatch.setattr(importlib.util, "find_spec", without)
    args = [str(tmp_path / "in"), str(tmp_path / "out"), "--to", "clip-jax", "--verify"]
    assert main(["convert", *args]) == 2
    assert "pip install 'clip-jax-pods[peers]'" in capsys.readouterr().err
    assert (tmp_path / "out/manifest.json").exists()
