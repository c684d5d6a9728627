"""CLIP in JAX: `load`, `tokenize`, `available_models`."""

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from clip_jax.load import load

__version__ = "0.1.0"
__all__ = ["available_models", "load", "tokenize"]


def available_models() -> list[str]:
    """List the architectures known by name; OpenAI's own names stand for OpenAI's models."""
    from clip_jax.models.zoo import ARCHITECTURES

    return list(ARCHITECTURES)


def tokenize(
    texts: "str | Sequence[str]", context_length: int = 77, truncate: bool = False
) -> "np.ndarray":
    """Turn texts into OpenAI's token ids, int32 `[B, context_length]`, zero-padded.

    ValueError for a text that is too long, unless `truncate`, which keeps the end of text.
    """
    from clip_jax.data.tokenizer import Tokenizer

    return Tokenizer()(texts, context_length, truncate)


class _Package(types.ModuleType):
    """`clip_jax.load` is the function: importing the module of that name must not put it here.

    It is looked up at the first use, so that `import clip_jax` brings neither jax nor Flax.
    """

    @property
    def load(self) -> Any:
        from clip_jax.load import load

        return load

    @load.setter
    def load(self, module: types.ModuleType) -> None:
        pass


sys.modules[__name__].__class__ = _Package
