"""Convert texts to token ids with the vocabulary and the rules of a model."""

import numpy as np
from jaxtyping import Integer

from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
from clip_jax.data.tokenizers.json_file import JSONTokenizer
from clip_jax.data.tokenizers.sentence_piece import SentencePieceTokenizer
from clip_jax.data.tokenizers.vocabulary import is_json, read_vocabulary
from clip_jax.errors import InputError
from clip_jax.models.text import TextConfig

Tokenizer = ClipTokenizer | JSONTokenizer | SentencePieceTokenizer


def read_captions(ids: Integer[np.ndarray, "B L"], text: TextConfig) -> list[str]:
    """Decode generated token ids to captions, each up to its end of text or padding."""
    tokenizer = make_tokenizer(text)
    ended = np.cumsum((ids == text.end_id) | (ids == text.tokenizer.pad_id), axis=1) > 0
    return [tokenizer.decode(row[~cut][1:]) for row, cut in zip(ids, ended, strict=True)]


def make_tokenizer(text: TextConfig) -> Tokenizer:
    """Build a text tower's tokenizer. Raises InputError if its vocabulary is missing or does not
    fit the tower."""
    config = text.tokenizer
    if (tokenizer := config.make(text)) is not None:
        return tokenizer
    if config.file == "clip":
        return ClipTokenizer(text.clip_vocab_size, config.clean)
    if not config.file:
        raise InputError(
            "this model's weights came without its vocabulary, a tokenizer.json or a "
            "sentencepiece model. Pass the file with --tokenizer, or set text.tokenizer.file."
        )
    json = is_json(read_vocabulary(config.file))
    tokenizer = JSONTokenizer(config) if json else SentencePieceTokenizer(config)
    size = tokenizer.vocab_size
    if size > text.vocab_size:
        raise InputError(
            f"{config.file} has {size} ids, more than text.vocab_size={text.vocab_size}. Raise "
            "text.vocab_size, or set text.tokenizer.file to the vocabulary of this model."
        )
    if text.pool == "argmax" and config.end_id != size - 1:
        raise InputError(
            f"text.pool='argmax' needs the highest id as the end of text, but "
            f"text.tokenizer.end_id={config.end_id} and {config.file} has ids to {size - 1}. Set "
            "text.pool='eos' with text.eos_token_id, or text.pool='last'."
        )
    if text.pool == "eos" and config.end_id != text.eos_token_id:
        raise InputError(
            f"text.eos_token_id={text.eos_token_id} is not text.tokenizer.end_id={config.end_id}, "
            "so text.pool='eos' would find no end of text. Set both to the same id."
        )
    return tokenizer
