"""CLIP's byte-level BPE over lower-cased text (paper, 2.4), with the ids of OpenAI's tokenizer.

Text is cleaned as OpenAI's is (ftfy, HTML unescaped twice, whitespace collapsed, lower case), split
into words at whitespace, and each word's ids are looked up in a cache; only new words need the
splitting pattern and the Rust BPE.
"""

import functools
import gzip
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
import regex
from jaxtyping import Int32, Integer
from tokenizers.models import BPE

from clip_jax.data.tokenizers.clean import CLEANING, repaired
from clip_jax.data.tokenizers.file_tokenizer import too_long
from clip_jax.errors import InputError
from clip_jax.models.text import Cleaning

START_OF_TEXT = "<|startoftext|>"
END_OF_TEXT = "<|endoftext|>"
WORD_END = "</w>"
FULL_VOCAB_SIZE = 49_408

# In every vocabulary: each byte, each byte at the end of a word, and the two special tokens.
_SMALLEST_VOCAB_SIZE = 2 * 256 + 2
_MAX_CACHED_WORDS = 1 << 19  # about 160 MB; then the cache is cleared
_MAX_CACHED_LETTERS = 64  # longer words rarely occur twice

# OpenAI's pattern. It needs `regex`, not `re` or Rust's: letters, numbers, spaces and upper-case
# forms of other letters ("'ſ" is a form of "'s") must be recognised as in OpenAI's code.
# (Its quirk: U+0345, a mark whose upper case is a letter, fits no alternative and is dropped.)
_PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>"
    r"|'s|'t|'re|'ve|'m|'ll|'d"
    r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)


# The letter that represents each byte, in the vocabulary's order: printable Latin-1 itself, the
# others U+0100 and up (GPT-2's table).
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = sorted(set(range(256)) - set(_PRINTABLE))
_LETTERS = {byte: chr(byte) for byte in _PRINTABLE}
_LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}


@dataclass(frozen=True)
class ClipTokenizer:
    """Convert texts to CLIP's token ids.

    A smaller `vocab_size` uses only the first merges of the same list, so a small model gets a
    small vocabulary: words are split into more pieces, and end-of-text stays the highest id, as
    OpenAI's pooling by argmax needs.

    Cheap to construct and to pickle: the vocabulary is read on first use. Threads may share it.
    Raises InputError for a `vocab_size` outside [514, 49408].
    """

    vocab_size: int = FULL_VOCAB_SIZE
    clean: Cleaning = "clip"

    def __post_init__(self) -> None:
        if not _SMALLEST_VOCAB_SIZE <= self.vocab_size <= FULL_VOCAB_SIZE:
            raise InputError(
                f"vocab_size={self.vocab_size}: CLIP's tokenizer has {_SMALLEST_VOCAB_SIZE} "
                f"(bytes only) to {FULL_VOCAB_SIZE} ids. Change text.vocab_size, or set "
                "text.tokenizer.file to the model's own vocabulary."
            )

    def __getstate__(self) -> dict[str, object]:
        # Without the cache: workers fill their own.
        return {"vocab_size": self.vocab_size, "clean": self.clean}

    def __call__(
        self, texts: str | Sequence[str], context_length: int = 77, truncate: bool = False
    ) -> Int32[np.ndarray, "B L"]:
        """Return the token ids of each text between start-of-text and end-of-text, then zeros.

        A text with more than `context_length` ids raises InputError, or is truncated with
        `truncate` (end-of-text stays last). A text that is not a str raises TypeError.
        """
        if context_length < 2:
            raise InputError(
                f"context_length={context_length} must be at least 2, for start and end of text"
            )
        if isinstance(texts, str):
            texts = [texts]
        ids = np.zeros((len(texts), context_length), np.int32)
        for row, text in zip(ids, texts, strict=True):
            text_ids = self._encode(text, context_length)
            if len(text_ids) > context_length:
                if not truncate:
                    raise too_long(text, context_length)
                del text_ids[context_length:]
                text_ids[-1] = self.end_of_text
            row[: len(text_ids)] = text_ids
        return ids

    def decode(self, ids: Integer[np.ndarray, " L"] | Sequence[int]) -> str:
        """Return the cleaned text of one row of ids, up to the first end-of-text."""
        tokens = self._tokens
        inside = itertools.takewhile(lambda i: i != self.end_of_text, (int(i) for i in ids))
        joined = "".join(tokens[i] for i in inside if i != self.start_of_text)
        data = bytes(_BYTES[letter] for letter in joined)
        return data.decode("utf-8", errors="replace").replace(WORD_END, " ").rstrip()

    @property
    def start_of_text(self) -> int:
        return self.vocab_size - 2

    @property
    def end_of_text(self) -> int:
        return self.vocab_size - 1

    @functools.cached_property
    def merges(self) -> list[tuple[str, str]]:
        """Pairs to merge, highest priority first; `tokenizer.json` has these and `vocab`."""
        path = resources.files("clip_jax.data.tokenizers") / "bpe_simple_vocab_16e6.txt.gz"
        count = self.vocab_size - _SMALLEST_VOCAB_SIZE
        with path.open("rb") as raw, gzip.open(raw, "rt", encoding="utf-8") as lines:
            pairs = (line.split() for line in itertools.islice(lines, 1, count + 1))  # 0: a header
            return [(left, right) for left, right in pairs]

    @functools.cached_property
    def vocab(self) -> dict[str, int]:
        """The id of each token, in the order of ids."""
        letters = list(_LETTERS.values())
        ends = [letter + WORD_END for letter in letters]
        merged = [left + right for left, right in self.merges]
        return {t: i for i, t in enumerate([*letters, *ends, *merged, START_OF_TEXT, END_OF_TEXT])}

    @functools.cached_property
    def _tokens(self) -> list[str]:
        return list(self.vocab)

    @functools.cached_property
    def _bpe(self) -> BPE:
        return BPE(self.vocab, self.merges, end_of_word_suffix=WORD_END, cache_capacity=0)

    @functools.cached_property
    def _cache(self) -> dict[str, list[int]]:
        return {}

    def _encode(self, text: object, enough: int) -> list[int]:
        """Return all ids of a text; of a long one, slightly more than `enough`."""
        if not isinstance(text, str):
            raise TypeError(f"a text must be a str, not {type(text).__name__}: {text!r:.200}")
        cache = self._cache
        ids = [self.start_of_text]
        for word in self._words(text):
            word_ids = cache.get(word)
            if word_ids is None:
                word_ids = self._encode_word(word)
            ids += word_ids
            if len(ids) > enough:
                break
        ids.append(self.end_of_text)
        return ids

    def _words(self, text: str) -> list[str]:
        if self.clean == "clip":  # the spaces that it would collapse are split at anyway
            return repaired(text).lower().split()
        return CLEANING[self.clean](text).split()

    def _encode_word(self, word: str) -> list[int]:
        ids = [i for piece in _PIECES.findall(word) for i in self._encode_piece(piece)]
        if len(word) <= _MAX_CACHED_LETTERS:
            if len(self._cache) >= _MAX_CACHED_WORDS:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def _encode_piece(self, piece: str) -> Iterator[int]:
        if piece in (START_OF_TEXT, END_OF_TEXT):
            yield self.vocab[piece]
            return
        letters = "".join(_LETTERS[byte] for byte in piece.encode())
        for token in self._bpe.tokenize(letters):
            yield token.id


def tokenize(
    texts: str | Sequence[str], context_length: int = 77, truncate: bool = False
) -> Int32[np.ndarray, "B L"]:
    """Turn texts into OpenAI's token ids, zero-padded.

    Raises InputError for a text that is too long, unless `truncate`, which keeps the end of text.

        >>> import clip_jax
        >>> clip_jax.tokenize(["a cat", "a photo of a cat"], context_length=7)
        array([[49406,   320,  2368, 49407,     0,     0,     0],
               [49406,   320,  1125,   539,   320,  2368, 49407]], dtype=int32)
    """
    return ClipTokenizer()(texts, context_length, truncate)
