"""The same ids as OpenAI's and open_clip's tokenizers on whatever can be typed or scraped."""

import html
import random
import re
import sys
import unicodedata

import ftfy
import numpy as np
import pytest

from clip_jax.data.tokenizers.clean import repaired
from clip_jax.data.tokenizers.clip import ClipTokenizer

TOKENIZER = ClipTokenizer()
MARKERS = ("startoftext", "endoftext", "start_of_text", "end_of_text")

# What `piece` draws from; a test string is a few pieces with something of `BETWEEN` after each.
WORDS = (
    "a photo of the cat dog's don't WE'LL I'm they've isn't he'd rock'n'roll naïve Café STRASSE "
    "straße ΟΔΟΣ Σ ΑΣ. ΑΣΑ İstanbul ıI ﬁsh ﬂow ſ 'ſ it'ſ 'S 'RE 'Ve 'LL 'd'd 'tis K Å ǅ ŉ ΐ ß ẞ "
    "1,234.50 ½ ² Ⅷ ①② ４５６ ४५ 三 x² 10th 3d c++ #tag @me e-mail https://a.b/c?d=e&f=g :-) ... … "
    "“quoted” ‘single’ don’t l’été – — ™ © € £5 ✓ 日本語 中文字符 한국어 עברית العربية हिन्दी ไทย "
    "ｱｲｳ Ｌｏｕｄ"
)
MOJIBAKE = "schön naïve “quoted” don’t — 日本 😀 español €5 ½ Ã Â Привет ça"
ENTITIES = (
    "&amp; &lt; &gt; &quot; &#39; &nbsp; &amp;amp; &amp;lt;b&amp;gt; &amp;amp;amp; &eacute; &AMP "
    "&notin &copy &#x1F600; &#128512; &#0; &#x1c; &#x85; &#x80; &#xD800; &#x110000; &#12; &#160; "
    "&amp;nbsp; &#x17f; '&#x17f; &bogus; &#; & &&amp;; &#x2028; &#x1680; &#8203; &Sigma; &zwj; "
    "<b>bold</b> <br/> &lt;|endoftext|&gt; <|endoftext&#124;>"
)
SPECIALS = [
    *(f"<|{marker}|>" for marker in MARKERS),
    *(f"<{marker}>" for marker in MARKERS),
    "<|EndOfText|>",
    "<|endoftext|",
    "|>",
    "<|endofteхt|>",
    "<|ſtartoftext|>",
    "<|endoftext|>'s",
    "</w>",
    "!</w>",
    "<|<|endoftext|>|>",
]
EMOJI = "😀 👩‍👩‍👧 👍🏽 🇩🇪 ❤️ 1️⃣ 🏴󠁧󠁢󠁥󠁮󠁧󠁿 ☺ 🫠 🪿 🫩"
BETWEEN = [" ", "", "  ", "\n", "\t", "\r\n", "\x0b", "\x0c", "\x1c", "\x1f", "\x85", "\xa0"]
BETWEEN += [" ", " ", " ", "\u2028", "\u3000", "\u200b", "\ufeff", "\u180e", "\u1680", "-", "'"]


def any_character(rng: random.Random) -> str:
    """From every plane, surrogates and the unassigned included; half from the two first blocks."""
    high = rng.choice((0x80, 0x250, 0x3000, 0x10000, 0x20000, sys.maxunicode + 1))
    return chr(rng.randrange(high))


def piece(rng: random.Random) -> str:
    kind = rng.randrange(9)
    if kind == 0:
        return "".join(any_character(rng) for _ in range(rng.randrange(1, 6)))
    if kind == 1:
        text = rng.choice(MOJIBAKE.split())
        for _ in range(rng.choice((1, 1, 2))):
            encoding = rng.choice(("latin-1", "cp1252", "cp1251", "cp437", "macroman"))
            text = text.encode("utf-8").decode(encoding, errors="replace")
        return text
    if kind == 2:
        return rng.choice(ENTITIES.split())
    if kind == 3:
        return rng.choice(SPECIALS)
    if kind == 4:
        return rng.choice(EMOJI.split())
    if kind == 5:
        return "".join(chr(rng.randrange(0x20, 0x7F)) for _ in range(rng.randrange(1, 12)))
    if kind == 6:
        return chr(rng.choice((*range(0x20), 0x7F, *range(0x80, 0xA0), 0x1B))) + "[31m"[:2]
    return rng.choice(WORDS.split())


def strings(count: int, seed: int) -> list[str]:
    """Mostly up to 20 pieces; one in a hundred is far longer than any context."""
    rng = random.Random(seed)
    result = []
    for _ in range(count):
        length = 400 if rng.random() < 0.01 else rng.randrange(21)
        parts = [part for _ in range(length) for part in (piece(rng), rng.choice(BETWEEN))]
        result.append("".join(parts))
    return result


def assert_same_ids(texts: list[str], openai_clip, open_clip) -> None:
    theirs = openai_clip.tokenize(texts, truncate=True).numpy()
    assert_equal(texts, theirs)
    # open_clip's markers are <start_of_text> and <end_of_text>: leave both kinds out.
    texts = [re.sub("text", "tent", text, flags=re.IGNORECASE) for text in texts]
    theirs = open_clip.tokenizer.SimpleTokenizer()(texts).numpy()
    assert_equal(texts, theirs)


def assert_equal(texts: list[str], theirs: np.ndarray) -> None:
    wrong = np.flatnonzero((TOKENIZER(texts, truncate=True) != theirs).any(axis=1))
    assert not wrong.size, f"{wrong.size} of {len(texts)} differ, first: {texts[wrong[0]]!r}"


def test_same_ids(openai_clip, open_clip):
    assert_same_ids(strings(2_000, seed=0), openai_clip, open_clip)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_same_ids_on_a_hundred_thousand_strings(seed, openai_clip, open_clip):
    assert_same_ids(strings(25_000, seed), openai_clip, open_clip)


def test_every_character_between_letters_and_alone(openai_clip, open_clip):
    """All of Unicode, 16 characters a text: each alone, in a word and after an apostrophe."""
    tokenizer = openai_clip.clip._tokenizer
    skipped = {"Cn", "Co", "Cs"}  # the unassigned all behave alike: one in 97 is enough
    chars = [
        chr(i)
        for i in range(sys.maxunicode + 1)
        if i % 97 == 0 or unicodedata.category(chr(i)) not in skipped
    ]
    chars = [
        c for c in chars if not ("\u4e00" <= c <= "\ud7a3" or c >= "\U00017000") or ord(c) % 7 == 0
    ]
    for start in range(0, len(chars), 16):
        text = " ".join(f"{c} a{c}b '{c}" for c in chars[start : start + 16])
        expected = tokenizer.encode(text)
        ids = TOKENIZER(text, context_length=1_000)[0]
        assert ids[1 : len(expected) + 2].tolist() == [*expected, TOKENIZER.end_of_text], text


def test_printable_ascii_needs_no_cleaning():
    """The shortcut of `repaired`: every pair of printable characters, and random texts of them."""
    printable = [chr(i) for i in range(0x20, 0x7F) if chr(i) != "&"]
    rng = random.Random(0)
    texts = ["".join(first + second for second in printable) for first in printable]
    texts += ["".join(rng.choices(printable, k=rng.randrange(40))) for _ in range(5_000)]
    texts += ["".join(rng.choices("<|>;#x1c/'\"\\-[m ", k=12)) for _ in range(5_000)]
    for text in texts:
        assert html.unescape(html.unescape(ftfy.fix_text(text))) == repaired(text)


def test_over_long_text_is_an_error_in_both(openai_clip):
    text = "a photo " * 40
    with pytest.raises(RuntimeError, match="too long"):
        openai_clip.tokenize([text])
    with pytest.raises(ValueError, match="context_length=77"):
        TOKENIZER([text])


def test_decodes_as_openai_does(openai_clip):
    tokenizer = openai_clip.clip._tokenizer
    for text in strings(300, seed=5):
        ids = TOKENIZER(text, context_length=100, truncate=True)[0].tolist()
        inside = ids[1 : ids.index(TOKENIZER.end_of_text)]
        inside = [i for i in inside if i != TOKENIZER.start_of_text]
        assert TOKENIZER.decode(ids) == tokenizer.decode(inside).rstrip()
