"""Tokenizers of vocabulary files: begin and end of text, truncation and padding."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32, Integer

from clip_jax.data.tokenizers.clean import CLEANING
from clip_jax.errors import InputError
from clip_jax.models.text import TokenizerConfig

_SHOWN = 200  # letters of a text in a message


@dataclass(frozen=True)
class FileTokenizer(abc.ABC):
    """Convert texts to the ids of a vocabulary file. Cheap to pickle: processes reread the file."""

    config: TokenizerConfig

    def __post_init__(self) -> None:
        for name in ("begin_id", "end_id", "pad_id", "zeroed_id"):
            value = getattr(self.config, name)
            if value is not None and not 0 <= value < self.vocab_size:
                raise InputError(
                    f"text.tokenizer.{name}={value} is not an id of {self.config.file}; it must be "
                    f"at least 0 and less than {self.vocab_size}."
                )

    def __getstate__(self) -> dict[str, object]:
        return {"config": self.config}

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids that a model needs."""

    @abc.abstractmethod
    def _encode(self, cleaned: list[str]) -> list[list[int]]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    def __call__(
        self, texts: str | Sequence[str], context_length: int, truncate: bool = False
    ) -> Int32[np.ndarray, "B L"]:
        """Return the token ids of each text, by the rules of `config`.

        Raises InputError for a text that is too long, unless `truncate`.
        """
        config = self.config
        texts = [texts] if isinstance(texts, str) else list(texts)
        begin = [] if config.begin_id is None else [config.begin_id]
        end = [] if config.end_id is None else [config.end_id]
        room = context_length - len(begin) - len(end)
        if room < 0:
            raise InputError(
                f"context_length={context_length} cannot hold begin and end of text; raise it."
            )
        ids = np.full((len(texts), context_length), config.pad_id, np.int32)
        encoded = self._encode(list(map(CLEANING[config.clean], texts)))
        for row, text, words in zip(ids, texts, encoded, strict=True):
            if len(words) > room and not truncate:
                raise too_long(text, context_length)
            if config.cut == "keep_end":
                words = words[:room]
            complete = [*begin, *words, *end][:context_length]
            if config.pad_side == "right":
                row[: len(complete)] = complete
            else:
                row[context_length - len(complete) :] = complete
        if config.zeroed_id is not None:
            ids[ids == config.zeroed_id] = 0
        return ids

    def decode(self, ids: Integer[np.ndarray, " L"] | Sequence[int]) -> str:
        """Return the text of one row of ids, without begin, end and padding."""
        rules = {self.config.begin_id, self.config.end_id, self.config.pad_id}
        return self._decode([int(i) for i in ids if int(i) not in rules])


def too_long(text: str, context_length: int) -> InputError:
    """Return the error for a text with too many ids."""
    shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
    return InputError(
        f"the text {shown!r} has more than context_length={context_length} ids; "
        "shorten it, or pass truncate=True"
    )
