"""What is done to a text before it becomes ids, by name; another rule gives other ids."""

import html
import string
from collections.abc import Callable

import ftfy
from tokenizers import normalizers

from clip_jax.models.text import Cleaning

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_LOWER = normalizers.Lowercase()


def repaired(text: str) -> str:
    """Repair mojibake and unescape HTML twice, as OpenAI does before tokenizing."""
    # Nothing to repair in printable ASCII without an HTML entity; ftfy would take longer to find
    # that out than all the rest takes. tests/reference compares both ways.
    if text.isascii() and text.isprintable() and "&" not in text:
        return text
    return html.unescape(html.unescape(ftfy.fix_text(text)))


def _whitespace(text: str) -> str:
    """open_clip's for vocabularies that are not CLIP's: repair, one space between words."""
    return " ".join(repaired(text).split())


def _punctuation(text: str) -> str:
    """`SiglipTokenizer`'s: lower the case, drop ASCII punctuation, one space between words."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _canonicalize(text: str) -> str:
    """open_clip's for SigLIP: repair, underscores to spaces, then as `_punctuation`."""
    return _punctuation(repaired(text).replace("_", " "))


def _clip(text: str) -> str:
    """OpenAI's: repair, one space between words, lower the case."""
    return _whitespace(text).lower()


CLEANING: dict[Cleaning, Callable[[str], str]] = {
    "none": lambda text: text,
    "lower": _LOWER.normalize_str,  # letter by letter, as transformers: no final sigma
    "whitespace": _whitespace,
    "punctuation": _punctuation,
    "canonicalize": _canonicalize,
    "clip": _clip,
}
