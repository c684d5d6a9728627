"""The text tower: a causal transformer read at the end-of-text token (CLIP paper, 2.4)."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from clip_jax.models.layers import (
    Activation,
    BlockConfig,
    BlockInit,
    DType,
    LayerNorm,
    Remat,
    Transformer,
    uniform,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """A text transformer. The defaults are those of OpenAI's ViT-B/32."""

    context_length: int = 77  # tokens, start and end of text included
    vocab_size: int = 49_408  # 256 × 2 bytes, merges, start and end of text
    width: int = 512  # channels of the residual stream
    depth: int = 12  # blocks
    num_heads: int = 8  # attention heads
    mlp_ratio: float = 4.0  # MLP width / width
    causal: bool = True  # a token sees only what stands before it
    # Which token's state stands for the text. argmax: the highest id, which is end of text in
    # CLIP's vocabulary; eos: the first eos_token_id (where ids were added above it).
    pool: Literal["argmax", "eos", "last"] = "argmax"
    eos_token_id: int = 49_407  # read by pool="eos" alone
    projection_bias: bool = False  # bias in the projection (SigLIP)
    activation: Activation = "quick_gelu"  # OpenAI's; open_clip's own models use gelu
    norm_epsilon: float = 1e-5  # LayerNorm's ε

    def __post_init__(self) -> None:
        if self.width % self.num_heads:
            raise ValueError(
                f"text.width={self.width} is not divisible by text.num_heads={self.num_heads}."
            )

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)


class TextTransformer(nn.Module):
    """Token and position embeddings, a transformer, the end-of-text state, a projection."""

    config: TextConfig
    embed_dim: int
    dtype: DType
    remat: Remat = "none"

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        c = self.config
        length = tokens.shape[1]
        if length > c.context_length:
            raise ValueError(
                f"tokens have length {length}, more than text.context_length={c.context_length}."
            )
        embedding = self.param(
            "token_embedding", nn.initializers.normal(0.02), (c.vocab_size, c.width)
        )
        positions = self.param(
            "positional_embedding", nn.initializers.normal(0.01), (c.context_length, c.width)
        )
        x = (embedding[tokens] + positions[:length]).astype(self.dtype)
        mask = jnp.tril(jnp.ones((length, length), bool)) if c.causal else None
        block = BlockConfig(
            c.num_heads, c.mlp_width, c.activation, c.norm_epsilon, BlockInit.text(c.width, c.depth)
        )
        x, _ = Transformer(block, c.depth, self.remat, name="transformer")(x, mask)

        match c.pool:
            case "argmax":  # OpenAI's reading of "end of text"
                end = tokens.argmax(axis=-1)
            case "eos":
                end = (tokens == c.eos_token_id).argmax(axis=-1)
            case "last":
                end = jnp.full(len(tokens), length - 1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        x = LayerNorm(c.norm_epsilon, name="ln_final")(x)
        projection = self.param(
            "text_projection", nn.initializers.normal(c.width**-0.5), (c.width, self.embed_dim)
        )
        x = jnp.einsum("BD,DE->BE", x, projection.astype(x.dtype))
        if c.projection_bias:
            bias = self.param("text_projection_bias", uniform(c.width**-0.5), (self.embed_dim,))
            x = x + bias.astype(x.dtype)
        return x
