"""Text tower: BERT (arXiv:1810.04805), RoBERTa or XLM-RoBERTa, as in open_clip's multilingual
models, AltCLIP (arXiv:2211.06679) and ChineseCLIP (arXiv:2211.01335)."""

from dataclasses import dataclass
from typing import Any, Literal, cast

from flax import linen as nn
from jaxtyping import Array, Float, Int

from clip_jax.errors import InputError
from clip_jax.models import layers
from clip_jax.models.layers import Activation, BlockConfig, Einsum, LayerNorm, Layout, Operations
from clip_jax.models.text import Pool, TextConfig, TextTransformer


@dataclass(frozen=True, kw_only=True)
class BertConfig(TextConfig):
    """Text tower: BERT or RoBERTa. The defaults are those of XLM-R base, as open_clip has it.

    LayerNorm follows each sum of a block (post-norm), and padding is masked.
    """

    num_positions: int = 514  # Rows of the table of position embeddings.
    first_position: int = 2  # Row of a text's first token. RoBERTa: behind the padding id; BERT: 0.
    token_types: int = 1  # Rows of the table of token types, of which the first is added.
    # What follows pooling. linear: a linear map. mlp: two linear maps around GELU (open_clip).
    # norm: LayerNorm, a linear map to embed_dim with a bias, a linear map (AltCLIP).
    head: Literal["linear", "mlp", "norm"] = "mlp"
    vocab_size: int = 250_002  # Number of token ids.
    width: int = 768  # Channels of the residual stream.
    num_heads: int = 12  # Number of attention heads.
    causal: bool = False  # Tokens attend only to themselves and earlier ones; must be False.
    pool: Pool = "mean"  # What becomes the embedding: mean, without padding, or the first token.
    activation: Activation = "gelu"  # MLP activation.

    masks_padding = has_token_types = True
    writes_captions = False

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = self.num_positions - self.first_position
        is_bert = self.pool in ("mean", "first") and not self.causal and self.projection
        if not is_bert or self.context_length > longest:
            raise InputError(
                f"text.pool={self.pool!r}, text.causal={self.causal}, text.projection="
                f"{self.projection}, text.context_length={self.context_length}: a BertConfig needs "
                f"pool='mean' or 'first', causal=False, projection=True, and at most {longest} "
                "tokens (text.num_positions less text.first_position)."
            )

    def projected_width(self, embed_dim: int) -> int:
        hidden = {"mlp": (self.width + embed_dim) // 2, "norm": embed_dim}
        return hidden.get(self.head, self.width)

    def block(self, layout: Layout) -> BlockConfig:
        return super().block(layout)._replace(norm="after")

    def module(self, **options: Any) -> "Bert":
        return Bert(self, **options)

    def operations(
        self, embed_dim: int, tokens: int, stack: Operations | None = None
    ) -> Operations:
        hidden = self.projected_width(embed_dim)
        more = (hidden - self.width) * embed_dim + (self.head != "linear") * self.width * hidden
        return super().operations(embed_dim, tokens, stack) + Operations(macs=more)


class Bert(TextTransformer):
    """BERT with the embedding's projection."""

    def setup(self) -> None:
        super().setup()
        c = cast(BertConfig, self.config)
        types, normal = (c.token_types, c.width), nn.initializers.normal(0.02)
        self.type_embedding = self.param("type_embedding", layers.named("- -", normal), types)
        self.ln_pre = LayerNorm(c.norm_epsilon)
        if c.head != "linear":
            hidden = c.projected_width(self.embed_dim)
            self.projection_hidden = Einsum(
                "BD,DE->BE",
                (c.width, hidden),
                (hidden,) if c.head == "norm" else None,
                layers.uniform(c.width**-0.5),
            )

    def embed(
        self, tokens: Int[Array, "B L"], position: Int[Array, ""] | None = None
    ) -> Float[Array, "B L D"]:
        return self.ln_pre(super().embed(tokens, position))

    def positions(self) -> Float[Array, "L D"]:
        first = cast(BertConfig, self.config).first_position
        return self.positional_embedding[first:] + self.type_embedding[0]

    def pool(self, x: Float[Array, "B L D"], tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        """Pool the states and project them."""
        c = cast(BertConfig, self.config)
        x = x[:, 0] if c.pool == "first" else layers.mean(x, self.lengths(tokens))
        if c.head == "norm":
            x = self.ln_final(x)
        if c.head != "linear":
            x = self.projection_hidden(x)
        return self.project(layers.gelu(x) if c.head == "mlp" else x)
