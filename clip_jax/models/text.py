"""The text tower: a causal transformer read at the end-of-text token (CLIP paper, 2.4)."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from clip_jax.errors import InputError, check_ranges
from clip_jax.models.layers import (
    Activation,
    Block,
    BlockConfig,
    BlockInit,
    DType,
    LayerNorm,
    Layout,
    Operations,
    Remat,
    Transformer,
    block_operations,
    named,
    uniform,
)  # fmt: skip

Pool = Literal["argmax", "eos", "last", "class_token", "mean"]
Cleaning = Literal["none", "lower", "whitespace", "punctuation", "canonicalize", "clip"]


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How texts become token ids: a vocabulary and its rules. Another rule gives other ids."""

    # clip: the bundled BPE of OpenAI, with OpenAI's rules; else the path of a tokenizer.json
    # or a sentencepiece model, local or in a bucket. Empty: weights that came without theirs.
    file: str = "clip"
    # Before the vocabulary sees a text. lower: the case. whitespace: repair mojibake and HTML, one
    # space between words. punctuation: lower, drop ASCII punctuation (SigLIP in Hugging Face).
    # canonicalize: repair, and that (SigLIP in open_clip). clip: repair, lower.
    clean: Cleaning = "clip"
    begin_id: int | None = None  # put before each text; None: nothing
    end_id: int | None = None  # put after each text; None: nothing
    pad_id: int = 0  # fills up to the context length
    pad_side: Literal["right", "left"] = "right"  # where the padding stands
    cut: Literal["keep_end", "drop_end"] = "keep_end"  # of a text that is too long

    def __post_init__(self) -> None:
        check_ranges(
            self, "text.tokenizer.", begin_id="[0, inf)", end_id="[0, inf)", pad_id="[0, inf)"
        )


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
    # CLIP's vocabulary; eos: the first eos_token_id (where ids were added above it); class_token: a
    # learned token behind all others (CoCa); mean: all positions', padding included (MaMMUT).
    pool: Pool = "argmax"
    # The class token sees no padding. False: it sees the first of it instead of itself, an error
    # in open_clip with which its released CoCa were trained.
    correct_class_mask: bool = True
    eos_token_id: int = 49_407  # read by pool="eos" alone
    projection: bool = True  # project to embed_dim (without it, width must equal embed_dim)
    projection_bias: bool = False  # bias in the projection (SigLIP)
    activation: Activation = "quick_gelu"  # OpenAI's; open_clip's own models use gelu
    norm_epsilon: float = 1e-5  # LayerNorm's ε
    tokenizer: TokenizerConfig = TokenizerConfig()  # whose ids the embedding has rows for

    def __post_init__(self) -> None:
        check_ranges(
            self, "text.",
            context_length="[2, inf)", vocab_size="[1, inf)", width="[1, inf)", depth="[1, inf)",
            num_heads="[1, inf)", mlp_ratio="(0, inf)", mlp_width="[1, inf)",
            eos_token_id="[0, inf)", norm_epsilon="(0, inf)",
        )  # fmt: skip
        if self.width % self.num_heads:
            raise InputError(
                f"text.width={self.width} is not divisible by text.num_heads={self.num_heads}."
            )
        if self.projection_bias and not self.projection:
            raise InputError("text.projection_bias=True needs text.projection=True.")

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.num_heads

    @property
    def has_class_token(self) -> bool:
        """Whether a learned token behind the text's stands for the text."""
        return self.pool == "class_token"

    @property
    def sees_padding(self) -> bool:
        """Whether a text's embedding depends on the id of its padding and on how much there is."""
        return not self.causal or self.pool not in ("argmax", "eos")

    @property
    def num_positions(self) -> int:
        return self.context_length + self.has_class_token

    @property
    def end_of_text_id(self) -> int:
        """The id of CLIP's end of text: the highest, or where ids were added above it, `eos`."""
        return self.eos_token_id if self.pool == "eos" else self.vocab_size - 1

    @property
    def clip_vocab_size(self) -> int:
        """How many ids CLIP's BPE has here: up to the end of text, which may have others above."""
        return self.end_of_text_id + 1

    @property
    def begin_id(self) -> int | None:
        """The id before each text; CLIP's vocabulary ends with it and the end of text."""
        own = self.tokenizer.file == "clip"
        return self.clip_vocab_size - 2 if own else self.tokenizer.begin_id

    @property
    def end_id(self) -> int | None:
        """The id behind each text."""
        own = self.tokenizer.file == "clip"
        return self.clip_vocab_size - 1 if own else self.tokenizer.end_id

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    def block(self, layout: Layout) -> BlockConfig:
        """What the tower's blocks are made of."""
        return BlockConfig(
            self.num_heads, self.mlp_width, self.activation, self.norm_epsilon,
            BlockInit.text(self.width, self.depth), causal=self.causal, layout=layout,
        )  # fmt: skip

    def check_width(self, embed_dim: int) -> None:
        """Raise InputError unless embeddings can have so many dimensions."""
        if not self.projection and self.width != embed_dim:
            raise InputError(
                f"text.projection=False needs text.width={self.width} to equal "
                f"embed_dim={embed_dim}."
            )

    def operations(
        self, embed_dim: int, tokens: int, stack: Operations | None = None
    ) -> Operations:
        """Count the tower for one text; looking an embedding up costs nothing."""
        tokens += self.has_class_token
        blocks = self.depth * block_operations(tokens, self.width, self.mlp_width)
        # OpenAI and open_clip normalise every token, then read one.
        ends = Operations(self.projection * self.width * embed_dim, layer_norm=tokens * self.width)
        return ends + (stack or blocks)


class TextTransformer(nn.Module):
    """Token and position embeddings, a transformer, the end-of-text state, a projection."""

    config: TextConfig
    embed_dim: int
    dtype: DType
    remat: Remat = "none"
    unroll: int = 1
    layout: Layout = Layout()
    block: type[nn.Module] = Block
    fields: tuple[Any, ...] = ()  # of each block
    blocks: int = 1  # that stand in one such

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal
        self.token_embedding = self.param(
            "token_embedding", named("- W", normal(0.02)), (c.vocab_size, c.width)
        )
        self.positional_embedding = self.param(
            "positional_embedding", named("L -", normal(0.01)), (c.num_positions, c.width)
        )
        if c.has_class_token:
            self.class_embedding = self.param(
                "class_embedding", named("-", normal(0.01)), (c.width,)
            )
        self.transformer = Transformer(
            c.block(self.layout), c.depth // self.blocks, self.remat, self.unroll, self.block,
            self.fields,
        )  # fmt: skip
        self.ln_final = LayerNorm(c.norm_epsilon)
        if c.projection:
            self.text_projection = self.param(
                "text_projection", named("D E", normal(c.width**-0.5)), (c.width, self.embed_dim)
            )
        if c.projection_bias:
            self.text_projection_bias = self.param(
                "text_projection_bias", named("-", uniform(c.width**-0.5)), (self.embed_dim,)
            )

    def __call__(self, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        return self.pool(self.states(tokens)[0], tokens)

    def states(
        self, tokens: Int[Array, "B L"], collect: bool = False
    ) -> tuple[Float[Array, "B l D"], Float[Array, "depth B l D"] | None]:
        """Return the last block's states, a class token's behind the text's.

        With `collect` every block's too.
        """
        c = self.config
        x = self.embed(tokens)
        if not c.has_class_token:
            return self.transformer(x, collect=collect)
        real, one = tokens != c.tokenizer.pad_id, jnp.ones((*tokens.shape[:1], 1), bool)
        token = self.class_embedding + self.positional_embedding[tokens.shape[1]]
        token = jnp.broadcast_to(token.astype(x.dtype), (*tokens.shape[:1], 1, c.width))
        return self.transformer(
            jnp.concatenate([x, token], axis=1),
            jnp.concatenate([real, one] if c.correct_class_mask else [one, real], axis=1),
            collect=collect,
        )

    def embed(
        self, tokens: Int[Array, "B L"], position: Int[Array, ""] | None = None
    ) -> Float[Array, "B L D"]:
        """Look tokens up, and add the positions from the first or from `position` on."""
        c = self.config
        length = tokens.shape[1]
        if length > c.context_length:
            raise InputError(
                f"tokens have length {length}, more than text.context_length={c.context_length}."
            )
        positions = self.positional_embedding[:length]
        if position is not None:
            positions = jax.lax.dynamic_slice_in_dim(self.positional_embedding, position, length)
        return (self.layout.lookup(self.token_embedding, tokens) + positions).astype(self.dtype)

    def pool(self, x: Float[Array, "B l D"], tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        """Take the state that stands for the text, norm and project it."""
        c = self.config
        match c.pool:
            case "argmax":  # OpenAI's reading of "end of text"
                end = tokens.argmax(axis=-1)
            case "eos":
                end = (tokens == c.eos_token_id).argmax(axis=-1)
            case _:
                end = jnp.full(tokens.shape[:1], x.shape[1] - 1)
        if c.pool == "mean":
            x = self.ln_final(x).mean(axis=1)
        else:
            x = jnp.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
            x = self.ln_final(x)
        if c.projection:
            x = self.layout.einsum("BD,DE->BE", x, self.text_projection.astype(x.dtype))
        if c.projection_bias:
            x = x + self.text_projection_bias.astype(x.dtype)
        return x
