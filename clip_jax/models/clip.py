"""CLIP as pure functions of a nested dict of parameters (paper, figure 3)."""

import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

from clip_jax.models.layers import DType, Remat
from clip_jax.models.text import TextConfig, TextTransformer
from clip_jax.models.vit import ViT, ViTConfig

Params = dict[str, Any]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Two towers and the embedding space they share."""

    embed_dim: int = 512  # dimensions of the shared space
    vision: ViTConfig = field(default_factory=ViTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    init_logit_scale: float = 1 / 0.07  # inverse temperature at the start (SigLIP: 10)
    init_logit_bias: float | None = None  # SigLIP: −10; None: no bias
    image_mean: tuple[float, float, float] = OPENAI_MEAN  # of RGB in [0, 1], subtracted
    image_std: tuple[float, float, float] = OPENAI_STD  # of RGB in [0, 1], divided by
    dtype: DType = "bfloat16"  # of the matmuls; parameters, norms and softmax are float32
    remat: Remat = "none"  # what the backward pass recomputes: nothing, all, or all but matmuls

    def __post_init__(self) -> None:
        if not self.vision.projection and self.vision.width != self.embed_dim:
            raise ValueError(
                f"vision.projection=False needs vision.width={self.vision.width} to equal "
                f"embed_dim={self.embed_dim}."
            )


class Towers(nn.Module):
    """Both towers and the logit scale under one tree of parameters."""

    config: CLIPConfig

    def setup(self) -> None:
        c = self.config
        self.visual = ViT(c.vision, c.embed_dim, c.remat)
        self.text = TextTransformer(c.text, c.embed_dim, c.dtype, c.remat)
        scale = math.log(c.init_logit_scale)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(scale), ())
        if c.init_logit_bias is not None:
            bias = nn.initializers.constant(c.init_logit_bias)
            self.logit_bias = self.param("logit_bias", bias, ())

    def encode_image(self, images: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        return self.visual(images.astype(self.config.dtype))

    def encode_text(self, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        return self.text(tokens)

    def __call__(
        self, images: Float[Array, "B H W C"], tokens: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B E"]]:
        return self.encode_image(images), self.encode_text(tokens)


@dataclass(frozen=True)
class CLIP:
    """The model's functions for one architecture; hashable, so that `jit` can take it as static.

    Parameters are plain nested float32 dicts: `visual`, `text`, `logit_scale` (its logarithm, as
    OpenAI stores it) and, for SigLIP, `logit_bias`. Features come back unnormalised, in float32.
    """

    config: CLIPConfig

    def init(self, key: Array) -> Params:
        """Draw parameters as OpenAI does; jit with `out_shardings` to shard them at birth."""
        c = self.config
        images = jnp.zeros((1, c.vision.image_size, c.vision.image_size, 3))
        tokens = jnp.zeros((1, c.text.context_length), jnp.int32)
        return Towers(c).init(key, images, tokens)["params"]

    def normalize(self, images: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Scale pixels to [0, 1], then by the model's mean and standard deviation of each channel."""
        c = self.config
        return (images.astype(jnp.float32) / 255 - jnp.array(c.image_mean)) / jnp.array(c.image_std)

    def encode_image(self, params: Params, images: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        """Embed normalised images `[B, H, W, 3]`."""
        features = Towers(self.config).apply({"params": params}, images, method="encode_image")
        return features.astype(jnp.float32)

    def encode_text(self, params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        """Embed token ids `[B, L]`, L at most the context length."""
        features = Towers(self.config).apply({"params": params}, tokens, method="encode_text")
        return features.astype(jnp.float32)


def l2_normalize(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Scale vectors to unit length."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def count(params: Params) -> int:
    """Count the parameters of a tree (arrays or shapes)."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))
