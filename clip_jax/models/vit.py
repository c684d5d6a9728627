"""Image tower: a vision transformer (CLIP paper, 2.4)."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Key

from clip_jax.errors import InputError, check_ranges
from clip_jax.models.decoder import CrossAttention
from clip_jax.models.images import Square
from clip_jax.models.layers import (
    MLP,
    Activation,
    BlockConfig,
    BlockInit,
    Einsum,
    LayerNorm,
    Layout,
    Operations,
    Remat,
    Transformer,
    block_operations,
    named,
    uniform,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Image tower: a vision transformer. The defaults are those of ViT-B/32."""

    image_size: int = 224  # Height and width of input images, in pixels.
    patch_size: int = 32  # Height and width of a patch, in pixels.
    width: int = 768  # Channels of the residual stream.
    depth: int = 12  # Number of transformer blocks.
    num_heads: int = 12  # Number of attention heads.
    mlp_ratio: float = 4.0  # Width of the MLP divided by that of the residual stream.
    # Pooling. mean: of the patches; mean_all: of patches and class token (MaMMUT); map: SigLIP's
    # attention pooling; queries: CoCa's, the first for the embedding, the others for captions.
    pool: Literal["class_token", "mean", "mean_all", "map", "queries"] = "class_token"
    pool_queries: int = 256  # Number of queries with pool=queries, the embedding's included.
    pool_heads: int = 8  # Number of attention heads with pool=queries.
    class_token: bool = True  # Prepend a learned token; pool=class_token needs it.
    pre_norm: bool = True  # LayerNorm before the first block.
    patch_bias: bool = False  # Bias in the patch projection.
    projection: bool = True  # Project to embed_dim; otherwise width must equal it.
    activation: Activation = "quick_gelu"  # MLP activation; OpenAI has quick_gelu, open_clip gelu.
    norm_epsilon: float = 1e-5  # Epsilon of LayerNorm.
    layer_scale: float | None = None  # Initial gain of residual branches. None: no gains.
    patch_dropout: float = 0.0  # Fraction of patches dropped in training (FLIP).

    positions_path = "visual/positional_embedding"  # in the model's parameters; no field

    def __post_init__(self) -> None:
        check_ranges(
            self, "vision.",
            image_size="[1, inf)", patch_size="[1, inf)", width="[1, inf)", depth="[1, inf)",
            num_heads="[1, inf)", mlp_ratio="(0, inf)", mlp_width="[1, inf)",
            pool_queries="[2, inf)", pool_heads="[1, inf)",
            norm_epsilon="(0, inf)", layer_scale="(-inf, inf)", patch_dropout="[0, 1)",
        )  # fmt: skip
        if self.image_size < self.patch_size:
            raise InputError(
                f"vision.image_size={self.image_size} must be at least one patch "
                f"(vision.patch_size={self.patch_size})."
            )
        if self.width % self.num_heads:
            raise InputError(
                f"vision.width={self.width} is no multiple of vision.num_heads={self.num_heads}."
            )
        if self.pool == "class_token" and not self.class_token:
            raise InputError(
                "vision.pool='class_token' needs vision.class_token=True; set it, or pool='mean'."
            )

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def image_spec(self) -> Square:
        return Square(self.image_size)

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.num_heads

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def kept_patches(self) -> int:
        """Patches left by patch dropout in training, at least one."""
        return max(round(self.num_patches * (1 - self.patch_dropout)), 1)

    @property
    def num_tokens(self) -> int:
        return self.num_patches + self.class_token

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the patches."""
        return int(self.class_token)

    @property
    def has_map_head(self) -> bool:
        """Whether tokens are pooled by attention of a learned query and an MLP (SigLIP)."""
        return self.pool == "map"

    @property
    def summary(self) -> str:
        """The architecture in one line, for model cards."""
        return (
            f"ViT of width {self.width}, depth {self.depth}, patches of {self.patch_size} pixels, "
            f"{self.activation}, {self.pool} pooling"
        )

    def caption_tokens(self, patches: int) -> int:
        """Return how many tokens a caption decoder attends to, given the number of patches."""
        if self.pool == "queries":
            return self.pool_queries - 1
        return patches + (self.class_token and self.pool in ("map", "mean_all"))

    def pooled_width(self, embed_dim: int) -> int:
        """Channels before the projection, and of the tokens that a caption decoder attends to."""
        return embed_dim if self.pool == "queries" else self.width

    def check_width(self, embed_dim: int) -> None:
        """Raise InputError unless embeddings can have `embed_dim` dimensions."""
        if not self.projection and self.width != embed_dim:
            raise InputError(
                f"vision.projection=False needs vision.width={self.width} to equal "
                f"embed_dim={embed_dim}."
            )
        if self.pool == "queries" and embed_dim % self.pool_heads:
            raise InputError(
                f"embed_dim={embed_dim} must be a multiple of vision.pool_heads={self.pool_heads}."
            )

    def module(self, embed_dim: int, remat: Remat, unroll: int, layout: Layout) -> "ViT":
        return ViT(self, embed_dim, remat, unroll, layout)

    def operations(self, embed_dim: int, *, training: bool = False) -> Operations:
        """Count the tower's operations for one image, in training without dropped patches."""
        tokens = (self.kept_patches if training else self.num_patches) + self.class_token
        patch, projected = self.patch_size**2 * 3, self.projection * self.pooled_width(embed_dim)
        ends = Operations(
            macs=self.num_patches * patch * self.width + projected * embed_dim,
            layer_norm=(self.pre_norm * tokens + 1) * self.width,
        )
        blocks = self.depth * block_operations(tokens, self.width, self.mlp_width)
        if self.pool not in HEADS:
            return ends + blocks
        return ends + blocks + HEADS[self.pool].operations(self, embed_dim, tokens, training)


def drop_patches(
    x: Float[Array, "B L D"], keys: Key[Array, " B"], kept: int
) -> Float[Array, "B l D"]:
    """Keep a random choice of each image's patches, which depends on its key only."""
    noise = jax.vmap(lambda key: jax.random.uniform(key, (x.shape[1],)))(keys)
    indices = jnp.argsort(noise, axis=1)[:, :kept]  # top_k would gather from all devices
    return jnp.take_along_axis(x, indices[:, :, None], axis=1)


class AttentionPool(nn.Module):
    """Attention of a learned query to all tokens, then a residual MLP (SigLIP's "MAP" head)."""

    config: ViTConfig
    embed_dim: int

    @staticmethod
    def operations(c: ViTConfig, embed_dim: int, tokens: int, training: bool) -> Operations:
        # The query's projections and MLP are of one token, ln_post of all tokens.
        return Operations(
            macs=2 * c.width * (c.width + tokens * (c.width + 1) + c.mlp_width),
            attention=2 * c.width * tokens,
            layer_norm=tokens * c.width,
        )

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B D"]:
        c = self.config
        heads = (c.num_heads, c.width // c.num_heads)
        init = uniform(c.width**-0.5)
        normal = named("- - -", nn.initializers.normal(c.width**-0.5))
        latent = self.param("latent", normal, (1, 1, c.width))
        q = Einsum("BLD,DNK->BLNK", (c.width, *heads), heads, init, init, name="q")(
            jnp.broadcast_to(latent.astype(x.dtype), (x.shape[0], 1, c.width))
        )
        kv = Einsum("BLD,DSNK->BLSNK", (c.width, 2, *heads), (2, *heads), init, init, name="kv")(x)
        x = jax.nn.dot_product_attention(q, kv[:, :, 0], kv[:, :, 1])
        x = Einsum("BLNK,NKD->BLD", (*heads, c.width), (c.width,), init, init, name="proj")(x)
        mlp = MLP(c.mlp_width, c.activation, BlockInit.image(c.width, c.mlp_width), name="mlp")
        return (x + mlp(LayerNorm(c.norm_epsilon, name="norm")(x)))[:, 0]


class QueryPool(nn.Module):
    """Attention of learned queries to all tokens (CoCa's "attentional pooler", as in open_clip)."""

    config: ViTConfig
    embed_dim: int

    @staticmethod
    def operations(c: ViTConfig, embed_dim: int, tokens: int, training: bool) -> Operations:
        # Queries are projected once per batch; published profiles count them for each image.
        projected = c.pool_queries * embed_dim * (1 if training else 2)
        return Operations(
            macs=(2 * tokens * (c.width + c.pool_queries) + projected) * embed_dim,
            attention=2 * tokens * c.pool_queries * embed_dim,
            layer_norm=(tokens - 1) * c.width + c.pool_queries * embed_dim,
        )

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B Q E"]:
        c = self.config
        normal = named("- -", nn.initializers.normal(1.0))
        query = self.param("query", normal, (c.pool_queries, self.embed_dim))
        query = LayerNorm(c.norm_epsilon, name="ln_q")(query.astype(x.dtype))
        init = uniform(self.embed_dim**-0.5)
        attn = CrossAttention(c.pool_heads, init, init, name="attn")
        return attn(query[None], LayerNorm(c.norm_epsilon, name="ln_k")(x))[0]


HEADS = {"map": AttentionPool, "queries": QueryPool}  # pools with parameters of their own


class ViT(nn.Module):
    """Vision transformer: patches, class token, positions, blocks, pooling, a projection."""

    config: ViTConfig
    embed_dim: int
    remat: Remat = "none"
    unroll: int = 1
    layout: Layout = Layout()

    def setup(self) -> None:
        c = self.config
        patch, scale = c.patch_size, c.width**-0.5
        self.conv1 = Einsum(
            "BLPQC,PQCD->BLD", (patch, patch, 3, c.width), (c.width,) if c.patch_bias else None,
            uniform((patch * patch * 3) ** -0.5), einsum=self.layout.einsum,
        )  # fmt: skip
        normal = nn.initializers.normal(scale)
        if c.class_token:
            self.class_embedding = self.param("class_embedding", named("-", normal), (c.width,))
        self.positional_embedding = self.param(
            "positional_embedding", named("L -", normal), (c.num_tokens, c.width)
        )
        if c.pre_norm:
            self.ln_pre = LayerNorm(c.norm_epsilon)
        block = BlockConfig(
            c.num_heads, c.mlp_width, c.activation, c.norm_epsilon,
            BlockInit.image(c.width, c.mlp_width), c.layer_scale, layout=self.layout,
        )  # fmt: skip
        self.transformer = Transformer(block, c.depth, self.remat, self.unroll)
        self.ln_post = LayerNorm(c.norm_epsilon)
        if c.pool in HEADS:
            self.attn_pool = HEADS[c.pool](c, self.embed_dim)
        if c.projection:
            shape = (c.pooled_width(self.embed_dim), self.embed_dim)
            self.proj = self.param("proj", named("D E", normal), shape)

    def __call__(
        self,
        images: Float[Array, "B H W C"],
        keys: Key[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B E"]:
        """Embed images; with `keys` patch dropout applies. `train` has no other effect."""
        return self.pool_and_tokens(self.tokens(images, keys=keys)[0])[0]

    def tokens(
        self,
        images: Float[Array, "B H W C"],
        collect: bool = False,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B L D"], Float[Array, "depth B L D"] | None]:
        """Return the last block's states, the class token's first; with `collect` every block's.

        With `keys`, one for each image, patch dropout applies.
        """
        c = self.config
        c.image_spec.check(images)
        patch = c.patch_size

        # Pixels beyond the last full patch are cut, as by a strided convolution (SO400M@384).
        side = c.image_size // patch * patch
        x = rearrange(images[:, :side, :side], "B (h P) (w Q) C -> B (h w) P Q C", P=patch, Q=patch)
        x = self.conv1(x)
        if c.class_token:
            token = self.class_embedding.astype(x.dtype)
            token = jnp.broadcast_to(token, (x.shape[0], 1, c.width))
            x = jnp.concatenate([token, x], axis=1)
        x = x + self.positional_embedding.astype(x.dtype)
        if keys is not None and c.patch_dropout:
            patches = drop_patches(x[:, int(c.class_token) :], keys, c.kept_patches)
            x = jnp.concatenate([x[:, : int(c.class_token)], patches], axis=1)
        if c.pre_norm:
            x = self.ln_pre(x)
        return self.transformer(x, collect=collect)

    def pool_and_tokens(
        self, x: Float[Array, "B L D"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B M C"]]:
        """Norm, pool and project; return also the tokens that a caption decoder attends to."""
        c = self.config
        tokens = x[:, int(c.class_token) :]
        # OpenAI normalises after pooling, SigLIP before; for a class token it makes no difference.
        match c.pool:
            case "class_token":
                x, tokens = self.ln_post(x[:, 0]), self.ln_post(tokens)
            case "mean":
                x = self.ln_post(tokens.mean(axis=1))
            case "mean_all":
                x, tokens = self.ln_post(x.mean(axis=1)), x
            case "map":
                tokens = self.ln_post(x)
                x = self.attn_pool(tokens)
            case "queries":
                x = self.ln_post(self.attn_pool(x))
                x, tokens = x[:, 0], x[:, 1:]
        if c.projection:
            x = self.layout.einsum("BD,DE->BE", x, self.proj.astype(x.dtype))
        return x, tokens
