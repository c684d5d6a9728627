"""A vocabulary in a sentencepiece model: SigLIP's unigram, Gemma's BPE with byte fallback."""

import functools

from sentencepiece import SentencePieceProcessor

from clip_jax.data.tokenizers.file_tokenizer import FileTokenizer
from clip_jax.data.tokenizers.vocabulary import read_vocabulary
from clip_jax.errors import InputError


def load(file: str) -> SentencePieceProcessor:
    """Read a sentencepiece model. Raises InputError if the file is not one."""
    data = read_vocabulary(file)
    try:
        return SentencePieceProcessor(model_proto=data)
    except (RuntimeError, OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{file} is neither a tokenizer.json nor a sentencepiece model: {error!s:.200}"
        ) from error


class SentencePieceTokenizer(FileTokenizer):
    """Convert texts to the ids of a sentencepiece model."""

    @functools.cached_property
    def _model(self) -> SentencePieceProcessor:
        return load(self.config.file)

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self._model.get_piece_size()

    def _encode(self, cleaned: list[str]) -> list[list[int]]:
        return self._model.encode(cleaned)

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)
