"""Parts of captions, and which further texts of an image are drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clip_jax.data.further import draw, parts, split
from clip_jax.models.inputs import FurtherTexts
from clip_jax.models.text import TextConfig


@pytest.mark.parametrize(
    ("caption", "sentences"),
    [
        ("A cat.", ["A cat."]),
        ("A cat. It sleeps!  Why? ", ["A cat.", "It sleeps!", "Why?"]),
        ("3.5 metres of v1.2 at example.com.", ["3.5 metres of v1.2 at example.com."]),
        ("one line\n\nanother", ["one line", "another"]),
        ("一只猫。它在睡觉。", ["一只猫。", "它在睡觉。"]),
        ("", []),
    ],
)
def test_sentences_end_before_a_space_or_with_the_line(caption, sentences):
    assert split(caption) == sentences


def test_parts_are_runs_of_sentences():
    caption = "A. B. C."
    assert parts(caption, 1) == ["A.", "B.", "C."]
    assert parts(caption, 2) == ["A.", "B.", "C.", "A. B.", "B. C."]
    assert parts(caption, 9) == parts(caption, 2)  # not the caption itself
    assert parts("A.", 3) == []


@given(
    captions=st.lists(st.sampled_from("abc "), min_size=1, max_size=7),
    count=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_each_other_caption_is_drawn_once_at_most(captions, count, seed):
    spec = FurtherTexts(TextConfig(), count, None)
    others = sorted([x for x in captions[1:] if x.strip()])
    drawn = draw(spec, captions[0], captions, np.random.default_rng(seed))
    assert len(drawn) == min(count, len(others))
    for text in drawn:
        others.remove(text)  # as often as the image has it
