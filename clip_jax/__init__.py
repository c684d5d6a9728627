"""CLIP in JAX: `load`, `tokenize`, `available_models`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from clip_jax.inference.loading import load

__version__ = "0.1.0"
__all__ = ["available_models", "load", "tokenize"]


def available_models() -> list[str]:
    """List the names of known architectures; OpenAI's names mean OpenAI's models."""
    from clip_jax.models.zoo import ARCHITECTURES

    return list(ARCHITECTURES)


def tokenize(
    texts: "str | Sequence[str]", context_length: int = 77, truncate: bool = False
) -> "np.ndarray":
    """Turn texts into OpenAI's token ids, int32 `[B, context_length]`, zero-padded.

    Raises InputError for a text that is too long, unless `truncate`, which keeps the end of text.
    """
    from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer

    return ClipTokenizer()(texts, context_length, truncate)


def __getattr__(name: str) -> Any:
    """Import `load` at its first use, so that `import clip_jax` imports neither JAX nor Flax."""
    if name == "load":
        from clip_jax.inference.loading import load

        return load
    raise AttributeError(f"module 'clip_jax' has no attribute {name!r}")
