"""CLIP in JAX: use, train, evaluate and convert models.

`__init__.pyi` lists the public names. Each is imported when it is first used, so that
`import clip_jax` imports neither JAX nor Flax.
"""

import lazy_loader

__version__ = "0.2.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
