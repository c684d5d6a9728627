"""BLEU and CIDEr-D are pycocoevalcap's, and words are cut as its tokenizer in Java cuts them."""

import shutil

import numpy as np
import pytest

from clip_jax.evals.caption_scores import bleu, cider, words_of

pytest.importorskip("pycocoevalcap")

TEXTS = [
    "A man's riding a wave on top of a surfboard.",
    "Two dogs don't play; they can't, it's raining!",
    "a T-shirt, size 3.5, for $1,000 (used) ...",
    "The U.S. flag -- red, white & blue -- at 5:30 p.m.",
    'the sign says "stop" & a cat\'s asleep',
    "Mr. Smith cannot swim, he'll sink?",
    "man standing next to a bike,near the trees",
    "rock 'n' roll",
    "a 50% off sale: 2 for 1",
    "black-and-white photo of a street/road",
]


def made_up():
    """Captions and several references each, of few words, so that n-grams are shared."""
    rng = np.random.default_rng(0)
    words = ["a", "the", "man", "dog", "on", "rides", "wave", "red", "big", "board", "near", "tree"]
    draw = lambda: " ".join(rng.choice(words, rng.integers(3, 12)))  # noqa: E731
    references = [[draw() for _ in range(rng.integers(1, 6))] for _ in range(30)]
    captions = [draw() if i % 3 else texts[0] for i, texts in enumerate(references)]
    return captions, references


def test_scores_are_pycocoevalcaps():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    captions, references = made_up()
    theirs = dict(enumerate(references)), {i: [text] for i, text in enumerate(captions)}
    np.testing.assert_allclose(
        bleu(captions, references), Bleu(4).compute_score(*theirs, verbose=0)[0], rtol=1e-12
    )
    np.testing.assert_allclose(
        cider(captions, references), Cider().compute_score(*theirs)[0], rtol=1e-12
    )


def test_a_caption_that_is_short_or_empty_scores_low():
    captions, references = made_up()
    whole = bleu(captions, references)
    assert bleu([""] * 30, references)[0] < 1e-6 < whole[3]
    assert cider([""] * 30, references) == 0
    assert bleu([text.split()[0] for text in captions], references)[0] < whole[0]


@pytest.mark.skipif(shutil.which("java") is None, reason="pycocoevalcap's tokenizer needs Java")
def test_words_are_cut_as_in_java():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(TEXTS)})
    for i, text in enumerate(TEXTS):
        assert " ".join(words_of(text)) == theirs[i][0], text
