"""Further texts of an image: its other captions, or parts of a caption (DreamLIP, Zheng et al.
2024, arXiv:2403.17007; FLAIR, Xiao et al. 2024, arXiv:2412.03561)."""

import re
from collections.abc import Sequence

import numpy as np

from clip_jax.models.inputs import FurtherTexts

# Between sentences: spaces after the end of one, or nothing after an ideographic full stop.
_BETWEEN = re.compile(r"(?<=[.!?…])\s+|(?<=[。！？])\s*|\s*\n\s*")


def draw(
    spec: FurtherTexts, caption: str, captions: Sequence[str], rng: np.random.Generator
) -> list[str]:
    """Draw at most `spec.count` different further texts of an image, beside its `caption`.

    They are parts of the caption, or others of all the image's `captions`.
    """
    texts = [*captions]
    if spec.sentences is not None:
        texts = parts(caption, spec.sentences)
    elif caption in texts:
        texts.remove(caption)  # once: captions that are the same are several
    texts = [text for text in texts if text.strip()]
    chosen = rng.permutation(len(texts))[: spec.count]
    return [texts[i] for i in sorted(chosen)]


def parts(caption: str, most: int) -> list[str]:
    """Return all parts of a caption of 1 to `most` adjacent sentences, except the caption itself.

    Sentences end in punctuation before a space, or at the end of a line.
    """
    sentences = split(caption)
    runs = (
        sentences[start : start + length]
        for length in range(1, min(most, len(sentences) - 1) + 1)
        for start in range(len(sentences) - length + 1)
    )
    return [" ".join(run) for run in runs]


def split(caption: str) -> list[str]:
    """Return the sentences of a caption."""
    ends = [*(x.span() for x in _BETWEEN.finditer(caption)), (len(caption), len(caption))]
    starts = [0, *(end for _, end in ends)]
    sentences = [caption[a:b].strip() for a, (b, _) in zip(starts, ends, strict=False)]
    return [x for x in sentences if x]
