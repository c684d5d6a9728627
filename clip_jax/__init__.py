"""CLIP in JAX: `load`, `tokenize`, `available_models`."""

__version__ = "0.1.0"
