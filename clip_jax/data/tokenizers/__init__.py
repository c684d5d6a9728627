"""Texts to token ids, by the vocabulary and the rules that belong to a model."""

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
    """Turn ids that a decoder wrote into texts: up to the end of text, or to padding."""
    tokenizer = make_tokenizer(text)
    ended = np.cumsum((ids == text.end_id) | (ids == text.tokenizer.pad_id), axis=1) > 0
    return [tokenizer.decode(row[~cut][1:]) for row, cut in zip(ids, ended, strict=True)]


def make_tokenizer(text: TextConfig) -> Tokenizer:
    """Build a text tower's tokenizer. Raises InputError if its vocabulary is not there, or is not
    for it."""
    config = text.tokenizer
    if config.file == "clip":
        return ClipTokenizer(text.clip_vocab_size, config.clean)
    if not config.file:
        raise InputError(
            "this model's weights came without its vocabulary. Give the file of it: --tokenizer, "
            "or text.tokenizer.file, a tokenizer.json or a sentencepiece model."
        )
    json = is_json(read_vocabulary(config.file))
    tokenizer = JSONTokenizer(config) if json else SentencePieceTokenizer(config)
    size = tokenizer.vocab_size
    if size > text.vocab_size:
        raise InputError(
            f"{config.file} has {size} ids, more than text.vocab_size={text.vocab_size}."
        )
    if text.pool == "argmax" and config.end_id != size - 1:
        raise InputError(
            f"text.pool='argmax' takes the state of the highest id for the end of a text, and "
            f"{config.file} with text.tokenizer.end_id={config.end_id} has {size - 1} for it; take "
            "text.pool='eos' with text.eos_token_id, or 'last'."
        )
    if text.pool == "eos" and config.end_id != text.eos_token_id:
        raise InputError(
            f"text.eos_token_id={text.eos_token_id} is not text.tokenizer.end_id={config.end_id}: "
            "no text would have an end."
        )
    return tokenizer
