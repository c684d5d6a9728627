"""Text tower: a causal transformer, pooled at the end-of-text token (CLIP paper, 2.4)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from clip_jax.errors import InputError
from clip_jax.models import layers
from clip_jax.models.layers import (
    Activation,
    Biases,
    BlockConfig,
    LayerNorm,
    Layout,
    Operations,
    named,
)
from clip_jax.models.tower import Cleaning as Cleaning
from clip_jax.models.tower import TextTowerConfig
from clip_jax.models.tower import TokenizerConfig as TokenizerConfig

Pool = Literal["argmax", "eos", "last", "class_token", "mean", "first"]


@dataclass(frozen=True, kw_only=True)
class TextConfig(TextTowerConfig):
    """Text tower: a transformer. The defaults are those of OpenAI's ViT-B/32."""

    width: int = 512  # Channels of the residual stream.
    depth: int = 12  # Number of transformer blocks.
    num_heads: int = 8  # Number of attention heads.
    mlp_ratio: float = 4.0  # Width of the MLP divided by that of the residual stream.
    causal: bool = True  # Tokens attend only to themselves and earlier ones.
    # Token whose state becomes the embedding. argmax: that of the highest id, which is end of text
    # in CLIP's vocabulary; eos: the first eos_token_id; last: the last position; class_token: a
    # learned token after all others (CoCa); mean: the mean of all, padding included (MaMMUT);
    # first: the first token (BERT).
    pool: Pool = "argmax"
    # Whether the class token attends to itself and not to padding. False: it attends to the first
    # padding token instead of itself, an error with which open_clip's CoCa models were trained.
    correct_class_mask: bool = True
    eos_token_id: int = 49_407  # End-of-text id; used only with pool=eos.
    projection: bool = True  # Project to embed_dim; otherwise width must equal it.
    projection_bias: bool = False  # Bias in the projection, as in SigLIP.
    activation: Activation = "quick_gelu"  # MLP activation; OpenAI has quick_gelu, open_clip gelu.
    norm_epsilon: float = 1e-5  # Epsilon of LayerNorm.
    biases: Biases = "qkv"  # Biases of attention's queries, keys and values; dino.txt has none.

    # Settings of derived towers, fixed here.
    token_scale = 1.0  # factor of token embeddings
    first_position = 0  # row of a text's first token in the table of positions
    has_token_types = False  # whether the embedding of the first token type is added to all tokens
    head = "linear"  # what follows pooling
    writes_captions = True
    embedding_parameters = ("text_projection", "text_projection_bias")

    def __post_init__(self) -> None:
        layers.check_sizes(self, "text.", norm_epsilon="(0, inf)")
        if self.width % self.num_heads:
            raise InputError(
                f"text.width={self.width} must be a multiple of text.num_heads={self.num_heads}."
            )
        if self.projection_bias and not self.projection:
            raise InputError("text.projection_bias=True needs text.projection=True.")
        if self.masks_padding and self.tokenizer.pad_side == "left":
            raise InputError(
                "text.tokenizer.pad_side='left' does not fit this text tower, which attends to the "
                "tokens before the padding; set it to right."
            )

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.num_heads

    @property
    def has_class_token(self) -> bool:
        """Whether the embedding is the state of a learned token after the text's."""
        return self.pool == "class_token"

    @property
    def sees_padding(self) -> bool:
        """Whether a text's embedding depends on the id and the amount of its padding."""
        return not self.masks_padding and (not self.causal or self.pool not in ("argmax", "eos"))

    def used_tokens(self, tokens: Int[Any, "*B L"]) -> Int[Any, "*B"]:
        if self.masks_padding:
            return super().used_tokens(tokens)
        return self.end_of_text(tokens) + 1

    def end_of_text(self, tokens: Int[Any, "*B L"]) -> Int[Any, "*B"]:
        """Return the position of the token that is pooled, with pool=argmax or eos."""
        is_argmax = self.pool == "argmax"  # OpenAI's rule for the end of text
        return (tokens if is_argmax else tokens == self.eos_token_id).argmax(axis=-1)

    @property
    def end_of_text_id(self) -> int:
        """The end-of-text id of CLIP's vocabulary: the highest, or `eos_token_id` with pool=eos."""
        return self.eos_token_id if self.pool == "eos" else super().end_of_text_id

    @property
    def short_name(self) -> str:
        return f"text-w{self.width}d{self.depth}"

    @property
    def num_layers(self) -> int:
        return self.depth

    @property
    def first_layers(self) -> Mapping[str, int]:
        inputs = ("token_embedding", "positional_embedding", "type_embedding", "class_embedding")
        return dict.fromkeys((*inputs, "ln_pre"), 0) | {"transformer": 1}

    @property
    def attention_tokens(self) -> int:
        return self.context_length + self.has_class_token

    def fixed_positions(self) -> Float[np.ndarray, "L D"] | None:
        """Return position embeddings that are computed; None: they are learned."""
        return None

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    def projected_width(self, embed_dim: int) -> int:
        """Channels before the projection."""
        return self.width

    def module(self, **options: Any) -> "TextTransformer":
        return TextTransformer(self, **options)

    def block(self, layout: Layout) -> BlockConfig:
        """Return the settings of the tower's blocks."""
        return BlockConfig(
            self.num_heads,
            self.mlp_width,
            self.activation,
            self.norm_epsilon,
            layers.BlockInit.text(self.width, self.depth),
            causal=self.causal,
            layout=layout,
            biases=self.biases,
        )

    def check_width(self, embed_dim: int) -> None:
        """Raise InputError unless embeddings can have `embed_dim` dimensions."""
        if not self.projection and self.width != embed_dim:
            raise InputError(
                f"text.projection=False needs text.width={self.width} to equal "
                f"embed_dim={embed_dim}."
            )

    def operations(
        self, embed_dim: int, tokens: int, stack: Operations | None = None
    ) -> Operations:
        """Count the tower's operations for one text; looking up embeddings costs nothing."""
        tokens += self.has_class_token
        sizes, gated = (tokens, self.width, self.mlp_width), self.activation == "swiglu"
        blocks = self.depth * layers.block_operations(*sizes, gated=gated)
        # OpenAI and open_clip normalise every token, then pool.
        ends = Operations(self.projection * self.width * embed_dim, layer_norm=tokens * self.width)
        return ends + (stack or blocks)


class TextTransformer(nn.Module):
    """Text tower: embeddings of tokens and positions, a transformer, pooling, a projection."""

    config: TextConfig
    embed_dim: int
    dtype: layers.DType
    remat: layers.Remat = "none"
    unroll: int = 1
    layout: Layout = Layout()
    block: type[nn.Module] = layers.Block
    fields: tuple[Any, ...] = ()  # further fields of `block`
    blocks: int = 1  # transformer blocks in one `block`

    def setup(self) -> None:
        c = self.config

        def normal(name: str, names: str, std: float, *shape: int) -> Any:
            return self.param(name, named(names, nn.initializers.normal(std)), shape)

        self.token_embedding = normal("token_embedding", "- W", 0.02, c.vocab_size, c.width)
        positions = (c.num_positions, c.width)
        if c.fixed_positions() is None:
            self.positional_embedding = normal("positional_embedding", "L -", 0.01, *positions)
        if c.has_class_token:
            self.class_embedding = normal("class_embedding", "-", 0.01, c.width)
        self.transformer = layers.Transformer(
            c.block(self.layout),
            c.depth // self.blocks,
            self.remat,
            self.unroll,
            self.block,
            self.fields,
        )
        self.ln_final = LayerNorm(c.norm_epsilon)
        if c.projection:
            sizes = (c.projected_width(self.embed_dim), self.embed_dim)
            self.text_projection = normal("text_projection", "D E", sizes[0] ** -0.5, *sizes)
        if c.projection_bias:
            self.text_projection_bias = self.param(
                "text_projection_bias", named("-", layers.uniform(c.width**-0.5)), (self.embed_dim,)
            )

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        return self.pool(self.states(tokens)[0], tokens)

    def states(
        self, tokens: Int[Array, "B L"], collect: bool = False
    ) -> tuple[Float[Array, "B l D"], Float[Array, "depth B l D"] | None]:
        """Return the last block's states, a class token's after the text's.

        With `collect`, return every block's, too.
        """
        c = self.config
        x = self.embed(tokens)
        if not c.has_class_token:
            return self.transformer(x, self.lengths(tokens), collect=collect)
        real, always = tokens != c.tokenizer.pad_id, jnp.ones((*tokens.shape[:1], 1), bool)
        token = self.class_embedding + self.positional_embedding[tokens.shape[1]]
        token = jnp.broadcast_to(token.astype(x.dtype), (*tokens.shape[:1], 1, c.width))
        return self.transformer(
            jnp.concatenate([x, token], axis=1),
            jnp.concatenate([real, always] if c.correct_class_mask else [always, real], axis=1),
            collect=collect,
        )

    def lengths(self, tokens: Int[Array, "B L"]) -> Int[Array, " B"] | None:
        """Return how many tokens precede the padding; None: the tower does not mask it."""
        c, ends = self.config, jnp.arange(1, tokens.shape[1] + 1)
        if not c.masks_padding:
            return None
        return jnp.where(tokens != c.tokenizer.pad_id, ends, 1).max(-1).astype(jnp.int32)

    def embed(
        self, tokens: Int[Array, "B L"], position: Int[Array, ""] | None = None
    ) -> Float[Array, "B L D"]:
        """Look up token embeddings and add those of positions, from 0 or from `position` on."""
        c = self.config
        length = tokens.shape[1]
        if length > c.context_length:
            raise InputError(
                f"tokens have length {length}, more than text.context_length={c.context_length}; "
                "truncate them."
            )
        table, x = self.positions(), self.layout.lookup(self.token_embedding, tokens)
        positions = table[:length]
        if position is not None:
            positions = jax.lax.dynamic_slice_in_dim(table, position, length)
        x = x if c.token_scale == 1 else x * c.token_scale
        return (x + positions).astype(self.dtype)

    def positions(self) -> Float[Array, "L D"]:
        """Return the position embeddings."""
        computed = self.config.fixed_positions()
        return self.positional_embedding if computed is None else jnp.asarray(computed)

    def pool(self, x: Float[Array, "B l D"], tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        """Pool the states, apply `ln_final`, and project."""
        c = self.config
        match c.pool:
            case "mean":
                x = layers.mean(self.ln_final(x), self.lengths(tokens))
            case "first":
                x = self.ln_final(x[:, 0])
            case "argmax" | "eos":
                end = c.end_of_text(tokens)
                x = self.ln_final(jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0])
            case _:
                x = self.ln_final(x[:, -1])
        return self.project(x)

    def project(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        """Project pooled states to the embedding space."""
        c = self.config
        if c.projection:
            y = self.layout.einsum("BD,DE->BE", x, self.text_projection.astype(x.dtype))
            x = layers.adapt(self, x, y, "text_projection_")
        if c.projection_bias:
            x = x + self.text_projection_bias.astype(x.dtype)
        return x
