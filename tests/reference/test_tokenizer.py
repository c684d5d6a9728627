"""The same ids as OpenAI's and open_clip's tokenizers on whatever can be typed or scraped.

`benchmarks/published.py tokens` compares 100,000 strings, and every character.
"""

import html

import ftfy
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clip_jax.data.tokenizers.clean import repaired
from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer

TOKENIZER = ClipTokenizer()
WORDS = (
    "a photo of don't WE'LL rock'n'roll Café straße ΟΔΟΣ Σ ΑΣ. İstanbul ﬁsh 'ſ 1,234.50 ½ ² "
    "４５６ ४५ 三 x² 10th c++ @me https://a.b/c?d=e&f=g … “quoted” ‘single’ — ™ 日本語 "
    "한국어 العربية हिन्दी ไทย ｱｲｳ &amp; &lt; &#39; &nbsp; &amp;lt;b&amp;gt; &eacute; &AMP "
    "&copy &#x1F600; &#0; &#x85; &#xD800; &#x110000; &#x17f; &bogus; &Sigma; <b>bold</b> "
    "<|EndOfTeхt|> </w> !</w> 😀 👩‍👩‍👧 👍🏽 🇩🇪 ❤️ schÃ¶n â€œquotedâ€\x9d æ—¥æœ¬ Ã Â"
)
PIECES = WORDS.split()
LETTERS = st.characters()  # of every plane, surrogates and the unassigned included
SIGNS = "abc <|>'&;#-[0"
TEXTS = st.lists(
    st.tuples(
        st.sampled_from(PIECES) | st.text(LETTERS, max_size=5) | st.text(SIGNS, max_size=9),
        st.sampled_from([" ", *"\n\t\x1c\x85\xa0\u2028\u200b\ufeff", ""]),
    ),
    max_size=20,
).map(lambda pairs: "".join(piece + between for piece, between in pairs))


def at_least(count):
    """Draw as many examples as the profile of Hypothesis, and at least `count`."""
    return settings(max_examples=max(count, settings().max_examples))


@pytest.fixture(scope="module")
def open_clips(open_clip):
    """open_clip's tokenizer, which takes long to build."""
    return open_clip.tokenizer.SimpleTokenizer()


@at_least(40)
@example(texts=[" ".join(PIECES[i:]) for i in range(0, len(PIECES), 3)])
@given(texts=st.lists(TEXTS, min_size=1, max_size=20))
def test_same_ids(openai_clip, open_clips, texts):
    ids = TOKENIZER(texts, truncate=True)
    np.testing.assert_array_equal(ids, openai_clip.tokenize(texts, truncate=True).numpy())
    # Each library has its own markers, which no text here holds.
    np.testing.assert_array_equal(ids, open_clips(texts).numpy())


def test_markers_and_decoding_are_openais(openai_clip):
    theirs = openai_clip.clip._tokenizer
    for text in (
        *("<|endoftext|>", "<|startoftext|> a <|EndOfText|>'s", "<start_of_text> b"),
        *("|><|endoftext", "<|<|endoftext|>|>", "<|ſtartoftext|>", "&lt;|endoftext|&gt;"),
        " ".join(PIECES),
    ):
        expected = theirs.encode(text)
        ids = TOKENIZER(text, context_length=1_000)[0]
        assert ids[1 : len(expected) + 2].tolist() == [*expected, TOKENIZER.end_of_text], text
        inside = ids[1 : ids.tolist().index(TOKENIZER.end_of_text)].tolist()
        inside = [i for i in inside if i != TOKENIZER.start_of_text]
        assert TOKENIZER.decode(ids) == theirs.decode(inside).rstrip()


@at_least(100)
@given(
    st.text(st.characters(max_codepoint=0x7E, min_codepoint=0x20)) | st.text("<|>;#x1c/'\"\\-[m ")
)
def test_printable_ascii_needs_no_cleaning(text):
    """The shortcut of `repaired`."""
    text = text.replace("&", "")
    assert html.unescape(html.unescape(ftfy.fix_text(text))) == repaired(text)
