"""A small model with random weights for evaluators, and small images.

All tests use the same model, so that those of a process share its compiled programs.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from clip_jax import sharding
from clip_jax.data.images import Preprocess
from clip_jax.data.tokenizers.clip_bpe import ClipTokenizer
from clip_jax.evals.evaluator import Encoder
from clip_jax.models.clip import CLIP, CLIPConfig, Params
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from tests.conftest import parameter_shapes

SMALL = CLIPConfig(
    embed_dim=16,
    vision=ViTConfig(image_size=16, patch_size=8, width=32, depth=1, num_heads=2),
    text=TextConfig(vocab_size=600, context_length=16, width=16, depth=1, num_heads=2),
    dtype="float32",
)


def mesh_of(devices: int = 8, **sizes: int) -> Mesh:
    """Return a mesh of the first devices, by the sizes of `MeshConfig`."""
    return sharding.make_mesh(sharding.MeshConfig(**sizes), jax.devices()[:devices])


def drawn(config: CLIPConfig = SMALL, scale: float = 0.5) -> Params:
    """Draw parameters with NumPy, which is faster than compiling the initialisation."""
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(config)
    return jax.tree.map(lambda x: rng.normal(0, scale, x.shape).astype(np.float32), shapes)


def encoder_on(
    mesh: Mesh,
    tokenize: Callable[[Sequence[str]], np.ndarray] | None = None,
    scale: float = 0.5,
    **preprocess: Any,
) -> Encoder:
    """Return the small model on a mesh, as evaluators use it."""
    tokenizer = ClipTokenizer(600)
    params = jax.device_put(drawn(scale=scale), sharding.replicated(mesh))
    return Encoder(
        CLIP(SMALL),
        params,
        mesh,
        Preprocess(image_size=16, **preprocess),
        tokenize or (lambda texts: tokenizer(list(texts), 16, True)),
    )


def unit(rows: np.ndarray) -> np.ndarray:
    """Scale rows to unit length."""
    return (rows / np.linalg.norm(rows, axis=-1, keepdims=True)).astype(np.float32)


def write_folder(path: Path, classes: Iterable[str], per_class: int = 1) -> None:
    """Write a folder of images for each class."""
    for name in classes:
        (path / name).mkdir(parents=True)
        for i in range(per_class):
            (path / name / f"{i}.png").write_bytes(png())


def png(pixels: np.ndarray | None = None) -> bytes:
    """Return pixels as PNG; by default 6 x 5 black ones."""
    file = io.BytesIO()
    Image.fromarray(np.zeros((6, 5, 3), np.uint8) if pixels is None else pixels).save(file, "PNG")
    return file.getvalue()
