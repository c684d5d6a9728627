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
    Layout,
    Remat,
    Transformer,
    uniform,
)  # fmt: skip

Pool = Literal["argmax", "eos", "last"]


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
    pool: Pool = "argmax"
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
    layout: Layout = Layout()

    def setup(self) -> None:
        c = self.config
        self.token_embedding = self.param(
            "token_embedding", nn.initializers.normal(0.02), (c.vocab_size, c.width)
        )
        self.positional_embedding = self.param(
            "positional_embedding", nn.initializers.normal(0.01), (c.context_length, c.width)
        )
        block = BlockConfig(
            c.num_heads, c.mlp_width, c.activation, c.norm_epsilon,
            BlockInit.text(c.width, c.depth), layout=self.layout,
        )  # fmt: skip
        self.transformer = Transformer(block, c.depth, self.remat)
        self.ln_final = LayerNorm(c.norm_epsilon)
        self.text_projection = self.param(
            "text_projection", nn.initializers.normal(c.width**-0.5), (c.width, self.embed_dim)
        )
        if c.projection_bias:
            self.text_projection_bias = self.param(
                "text_projection_bias", uniform(c.width**-0.5), (self.embed_dim,)
            )

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        return self.pool(self.states(tokens)[0], tokens)

    def states(
        self, tokens: Int[Array, "B L"], collect: bool = False
    ) -> tuple[Float[Array, "B L D"], Float[Array, "depth B L D"] | None]:
        """Return the last block's states; with `collect` every block's too."""
        c = self.config
        length = tokens.shape[1]
        if length > c.context_length:
            raise ValueError(
                f"tokens have length {length}, more than text.context_length={c.context_length}."
            )
        x = self.layout.lookup(self.token_embedding, tokens) + self.positional_embedding[:length]
        mask = jnp.tril(jnp.ones((length, length), bool)) if c.causal else None
        return self.transformer(x.astype(self.dtype), mask, collect)

    def pool(self, x: Float[Array, "B L D"], tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        """Take the state that stands for the text, norm and project it."""
        c = self.config
        match c.pool:
            case "argmax":  # OpenAI's reading of "end of text"
                end = tokens.argmax(axis=-1)
            case "eos":
                end = (tokens == c.eos_token_id).argmax(axis=-1)
            case "last":
                end = jnp.full(len(tokens), tokens.shape[1] - 1)
        x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
        x = self.ln_final(x)
        x = self.layout.einsum("BD,DE->BE", x, self.text_projection.astype(x.dtype))
        if c.projection_bias:
            x = x + self.text_projection_bias.astype(x.dtype)
        return x
