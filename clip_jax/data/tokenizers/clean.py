"""Cleaning of texts before tokenization, by name; another rule gives other token ids."""

import html
import string
from collections.abc import Callable

from tokenizers import normalizers

from clip_jax.models.text import Cleaning

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LOWER = normalizers.Lowercase()


def repaired(text: str) -> str:
    """Repair mojibake and unescape HTML twice, as OpenAI does before tokenizing."""
    # Printable ASCII without an HTML entity needs no repair, and ftfy would take longer to see that
    # than all the rest takes. tests/reference compares both ways.
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    import ftfy

    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _whitespace(text: str) -> str:
    """Repair and collapse whitespace, as open_clip does for vocabularies other than CLIP's."""
    return " ".join(repaired(text).split())


def _punctuation(text: str) -> str:
    """Lower-case, drop ASCII punctuation and collapse whitespace, as `SiglipTokenizer` does."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _canonicalize(text: str) -> str:
    """Repair, replace underscores by spaces, then as `_punctuation`: open_clip's for SigLIP."""
    return _punctuation(repaired(text).replace("_", " "))


def _clip(text: str) -> str:
    """Repair, collapse whitespace and lower-case, as OpenAI does."""
    return _whitespace(text).lower()


CLEANING: dict[Cleaning, Callable[[str], str]] = {
    "none": lambda text: text,
    "lower": _LOWER.normalize_str,  # letter by letter, as in transformers: no final sigma
    "whitespace": _whitespace,
    "punctuation": _punctuation,
    "canonicalize": _canonicalize,
    "clip": _clip,
}
