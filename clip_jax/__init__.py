"""CLIP in JAX: use, train, evaluate and convert models.

`__init__.pyi` lists the public names. Each is imported when it is first used, so that
`import clip_jax` imports neither JAX nor Flax.
"""

from typing import Any

import lazy_loader

__version__ = "0.2.0"
_FORMER_NAMES: dict[str, tuple[str, str]] = {}  # → present name, first version without the former
_public, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    if name not in _FORMER_NAMES:
        return _public(name)
    import warnings

    from clip_jax.errors import former_name

    present, until = _FORMER_NAMES[name]
    message = f"clip_jax: {former_name(name, present, until)}"
    warnings.warn(message, DeprecationWarning, stacklevel=2)
    return _public(present)
