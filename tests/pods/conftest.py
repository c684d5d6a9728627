"""A model and its recipe for tests of `plan`, and small HLO modules."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from clip_jax.losses import SoftmaxConfig
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TextConfig
from clip_jax.models.vit import ViTConfig
from clip_jax.optim import OptimConfig
from clip_jax.step import Recipe

BATCH = 48
# All dimensions differ, so that an array can be identified by its shape.
MODEL = CLIPConfig(
    embed_dim=20,
    vision=ViTConfig(image_size=24, patch_size=8, width=32, depth=2, num_heads=2, mlp_ratio=3.0),
    text=TextConfig(vocab_size=521, context_length=12, width=40, depth=2, num_heads=4),
    dtype="float32",
)


def recipe(model: CLIPConfig = MODEL, form: str = "dense") -> Recipe:
    loss, optim = SoftmaxConfig(form=form), OptimConfig(warmup_steps=1)
    return Recipe(model=model, objective=(loss,), optim=optim, steps=10, batch_size=BATCH)


def module(*lines: str) -> str:
    """Return an HLO module whose entry computation has these lines."""
    return "\n".join(["HloModule m", "ENTRY %main (x: f32[]) -> f32[] {", *lines, "}"])


@functools.cache
def compiled_scan() -> Any:
    """Compile the gradient of a scan with three products."""

    def scanned(x, w):
        return jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, w)[0].sum()

    return jax.jit(jax.grad(scanned)).lower(jnp.ones((8, 16)), jnp.ones((3, 16, 16))).compile()
