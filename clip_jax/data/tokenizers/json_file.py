"""A vocabulary in a `tokenizer.json` of the `tokenizers` library: BPE, WordPiece or unigram.

The file defines how text is split into words and words into ids. Its post-processor, padding and
truncation are ignored: the model's own rules apply.
"""

import base64
import contextlib
import functools
import json
import math
from collections.abc import Generator
from typing import Any

from tokenizers import Tokenizer

from clip_jax.data.tokenizers.file_tokenizer import FileTokenizer
from clip_jax.data.tokenizers.vocabulary import read_vocabulary
from clip_jax.errors import InputError

_MOST_GROWTH = 1 << 14  # largest growth of a text; sentencepiece's rules reach a few hundred
_GROWTH = {  # largest growth of one letter, in letters or bytes
    "NFKC": 18,
    "NFKD": 18,
    "NFC": 3,
    "NFD": 4,
    "Lowercase": 2,
    "BertNormalizer": 3,
    "ByteLevel": 4,
    "Metaspace": 2,
}


def load(file: str) -> Tokenizer:
    """Read a `tokenizer.json` without its padding and truncation. Raises InputError as `read`."""
    tokenizer = read(file)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def read(file: str) -> Tokenizer:
    """Read a `tokenizer.json`. Raises InputError if it is damaged or would exhaust the memory."""
    data = read_vocabulary(file)
    with damage_refused(file):
        text = data.decode()
        model = json.loads(text)["model"]
        if model.get("continuing_subword_prefix") and model.get("merges"):
            # The library cuts this many bytes from a token, also within a letter, and then aborts.
            raise ValueError("a BPE with model.continuing_subword_prefix is not supported")
        tokenizer = Tokenizer.from_str(text)
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = getattr(tokenizer, name)
        if part is not None and _growth(json.loads(part.__getstate__())) > _MOST_GROWTH:
            raise InputError(
                f"{file}: its {name} may make a text more than {_MOST_GROWTH} times as long, which "
                "would exhaust the memory and no vocabulary needs. Use another file."
            )
    return tokenizer


def _growth(step: dict[str, Any]) -> float:
    """Bound the factor by which a step of a tokenizer lengthens a text."""
    match step["type"]:
        case "Sequence":
            steps = next(value for value in step.values() if isinstance(value, list))
            return math.prod(map(_growth, steps), start=1.0)
        case "Replace":
            pattern, length = step["pattern"].get("String"), len(step["content"])
            # A regular expression may match between any two letters.
            return max(1, length / len(pattern)) if pattern else 1 + length
        case "Prepend":
            return 1 + len(step["prepend"])
        case "Precompiled":  # the length of a table, the table, and its replacements
            data = base64.b64decode(step["precompiled_charsmap"])
            texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
            return max(1, *map(len, texts))
        case kind:
            return _GROWTH.get(kind, 1)


@contextlib.contextmanager
def damage_refused(file: str) -> Generator[None]:
    """Raise InputError where the library fails, or panics, on a file's content."""
    try:
        yield
    except BaseException as error:  # a panic in Rust is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise InputError(f"{file} is not a valid tokenizer.json: {error!s:.200}") from None


class JSONTokenizer(FileTokenizer):
    """Convert texts to the ids of a `tokenizer.json`."""

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load(self.config.file)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def _encode(self, cleaned: list[str]) -> list[list[int]]:
        with damage_refused(self.config.file):  # its regular expressions may need too many steps
            encodings = self._tokenizer.encode_batch_fast(cleaned, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)
