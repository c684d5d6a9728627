"""A vocabulary in a `tokenizer.json` (of the library `tokenizers`): BPE, WordPiece, unigram.

The file says how text is split into words and words into ids. What its post-processor would add,
and how it would pad and cut, is left to the model's own rules.
"""

import contextlib
import functools
from collections.abc import Generator

from tokenizers import Tokenizer

from clip_jax.data.tokenizers.rules import FileTokenizer
from clip_jax.data.tokenizers.vocabulary import read_vocabulary
from clip_jax.refused import Refused


def load(file: str) -> Tokenizer:
    """Read a `tokenizer.json`. Refused says what is wrong with it."""
    data = read_vocabulary(file)
    with damage_refused(file):
        tokenizer = Tokenizer.from_str(data.decode())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


@contextlib.contextmanager
def damage_refused(file: str) -> Generator[None]:
    """Raise Refused where the library fails, or panics, on what a file says."""
    try:
        yield
    except BaseException as error:  # a panic of the Rust library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise Refused(f"{file} is no tokenizer.json: {error!s:.200}") from None


class JSONTokenizer(FileTokenizer):
    """Text to the ids of a `tokenizer.json`."""

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load(self.config.file)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def _encode(self, cleaned: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(cleaned, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)
