"""Similarity of generated captions to references: BLEU (Papineni et al. 2002) and CIDEr-D
(Vedantam et al. 2015), as COCO's evaluation computes both.

Texts are first split into lower-case words by Penn Treebank rules; punctuation is left out.
"""

import functools
import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_ORDER = 4  # longest n-gram
_SIGMA = 6.0  # width of CIDEr's Gaussian length penalty
_TINY, _SMALL = 1e-15, 1e-9  # COCO's constants against division by zero

_PUNCTUATION = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'}
# COCO's punctuation list has these in capitals, so it does not remove them from lower case.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "{": "-lcb-", "}": "-rcb-", "[": "-lsb-", "]": "-rsb-"}
_WORD = re.compile(
    r"""
    (?:[a-z]\.){2,}                                     # u.s.
    | \d+(?:[.,:/]\d+)+                                 # 1,000  3.5  5:30  1/2
    | (?:mr|mrs|ms|dr|st|jr|sr|vs|etc|inc|co|no)\.(?=\s+\w)
    | 'n'(?=\s)                                         # rock 'n' roll
    | '(?:s|m|d|ll|re|ve|em|tis|twas)\b                 # the second half of it's
    | n't\b
    | \w+?(?=n't\b)                                     # the first half of don't
    | \w+(?:[-&/]\w+)*                                  # t-shirt
    | \.{2,} | --+ | ``|'' | \S
    """,
    re.VERBOSE,
)
_TWO = {
    "cannot": ["can", "not"],
    "gonna": ["gon", "na"],
    "gotta": ["got", "ta"],
    "wanna": ["wan", "na"],
    "gimme": ["gim", "me"],
    "lemme": ["lem", "me"],
}


def words_of(text: str) -> list[str]:
    """Split a caption into its words."""
    words: list[str] = []
    for word in _WORD.findall(text.lower().replace("’", "'")):
        words += _TWO.get(word, [_BRACKETS.get(word, word)])
    return [word for word in words if word not in _PUNCTUATION and not set(word) <= set(".-")]


def _n_grams(words: Sequence[str]) -> list[Counter[tuple[str, ...]]]:
    """Count the n-grams of each length."""
    return [
        Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        for n in range(1, _ORDER + 1)
    ]


def bleu(captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Return BLEU-1 to BLEU-4 of all captions; the closest reference length counts for each."""
    right, written = np.zeros(_ORDER), np.zeros(_ORDER)
    length = wanted = 0
    for caption, texts in zip(captions, references, strict=True):
        words, others = words_of(caption), [words_of(text) for text in texts]
        of_others = zip(*map(_n_grams, others), strict=True)
        for n, (grams, counts) in enumerate(zip(_n_grams(words), of_others, strict=True)):
            most = functools.reduce(operator.or_, counts)
            right[n] += (grams & most).total()
            written[n] += grams.total()
        length += len(words)
        wanted += min((abs(len(other) - len(words)), len(other)) for other in others)[1]
    ratio = (length + _TINY) / (wanted + _SMALL)
    penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    products = np.cumprod((right + _TINY) / (written + _SMALL))
    return [float(x ** (1 / n) * penalty) for n, x in enumerate(products, 1)]


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Return the mean CIDEr-D; document frequencies are those of the references."""
    grams = [[_n_grams(words_of(text)) for text in texts] for texts in references]
    seen_in = Counter(gram for texts in grams for gram in set().union(*itertools.chain(*texts)))
    documents = math.log(len(grams))

    def weigh(counts: Counter[tuple[str, ...]]) -> dict[tuple[str, ...], float]:
        return {g: n * (documents - math.log(max(seen_in[g], 1))) for g, n in counts.items()}

    def cosine(a: dict, b: dict) -> float:
        norms = math.hypot(*a.values()) * math.hypot(*b.values())
        alike = sum(min(x, b.get(gram, 0.0)) * b.get(gram, 0.0) for gram, x in a.items())
        return alike / norms if norms else 0.0

    scores = []
    for caption, texts in zip(captions, grams, strict=True):
        mine = _n_grams(words_of(caption))
        weights = [weigh(counts) for counts in mine]
        total = 0.0
        for other in texts:
            alike = np.mean([cosine(a, weigh(b)) for a, b in zip(weights, other, strict=True)])
            difference = mine[1].total() - other[1].total()  # COCO measures the length in bigrams
            total += alike * math.exp(-(difference**2) / (2 * _SIGMA**2))
        scores.append(10 * total / len(texts))
    return float(np.mean(scores))
