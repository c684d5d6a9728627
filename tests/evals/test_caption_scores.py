"""BLEU and CIDEr-D are pycocoevalcap 1.2's, and words are cut as its tokenizer in Java cuts them.

What they gave is recorded here.
"""

import random

import numpy as np

from clip_jax.evals.caption_scores import bleu, cider, words_of

WORDS = {
    "A man's riding a wave on top of a surfboard.": "a man 's riding a wave on top of a surfboard",
    "Two dogs don't play; they can't, it's raining!": (
        "two dogs do n't play they ca n't it 's raining"
    ),
    "a T-shirt, size 3.5, for $1,000 (used) ...": "a t-shirt size 3.5 for $ 1,000 -lrb- used -rrb-",
    "The U.S. flag -- red, white & blue -- at 5:30 p.m.": (
        "the u.s. flag red white & blue at 5:30 p.m."
    ),
    'the sign says "stop" & a cat\'s asleep': "the sign says stop & a cat 's asleep",
    "Mr. Smith cannot swim, he'll sink?": "mr. smith can not swim he 'll sink",
    "man standing next to a bike,near the trees": "man standing next to a bike near the trees",
    "rock 'n' roll": "rock 'n' roll",
    "a 50% off sale: 2 for 1": "a 50 % off sale 2 for 1",
    "black-and-white photo of a street/road": "black-and-white photo of a street/road",
}


def test_scores_are_pycocoevalcaps():
    """Of captions and several references each, of few words, so that n-grams are shared."""
    rng = random.Random(0)
    words = ["a", "the", "man", "dog", "on", "rides", "wave", "red", "big", "board", "near", "tree"]
    draw = lambda: " ".join(rng.choices(words, k=rng.randrange(3, 12)))  # noqa: E731
    references = [[draw() for _ in range(rng.randrange(1, 6))] for _ in range(30)]
    captions = [draw() if i % 3 else texts[0] for i, texts in enumerate(references)]
    expected = [0.7788461538424094, 0.561283256197167, 0.4950614444587654, 0.46886551450438396]
    np.testing.assert_allclose(bleu(captions, references), expected, rtol=1e-12)
    np.testing.assert_allclose(cider(captions, references), 2.0501871977030164, rtol=1e-12)
    assert bleu([""] * 30, references)[0] < 1e-6
    assert cider([""] * 30, references) == 0


def test_words_are_cut_as_in_java():
    assert {text: " ".join(words_of(text)) for text in WORDS} == WORDS
