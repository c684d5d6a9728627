"""Image tower: a vision transformer (CLIP paper, 2.4), also of any aspect ratio (NaFlex)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from clip_jax.errors import InputError
from clip_jax.models import attention, layers
from clip_jax.models.decoder import CrossAttention
from clip_jax.models.images import (
    Images,
    ImageTokens,
    Patches,
    join_tokens,
    split_tokens,
)
from clip_jax.models.layers import Activation, Einsum, LayerNorm, Layout, Operations, named, uniform
from clip_jax.models.tower import Arrays, ImageTowerConfig

AnyViT = TypeVar("AnyViT", bound="ViTConfig")
Lengths = Int[Array, " B"] | None  # valid tokens of each image; None: all


class Masked(NamedTuple):
    """Patches that a learned token replaces."""

    patches: Bool[Array, "B L"]
    token: Float[Array, " D"]


@dataclass(frozen=True, kw_only=True)
class ViTConfig(ImageTowerConfig):
    """Image tower: a vision transformer. The defaults are those of ViT-B/32."""

    patch_size: int = 32  # Height and width of a patch, in pixels.
    # Maximum number of patches of an image at its own aspect ratio (NaFlex); image_size is then
    # that of the position embeddings. None: square images of image_size.
    max_patches: int | None = None
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
    projection_bias: bool = False  # Bias in the projection, as in MobileCLIP.
    activation: Activation = "quick_gelu"  # MLP activation; OpenAI has quick_gelu, open_clip gelu.
    norm_epsilon: float = 1e-5  # Epsilon of LayerNorm.
    layer_scale: float | None = None  # Initial gain of residual branches. None: no gains.
    patch_dropout: float = 0.0  # Fraction of patches dropped in training (FLIP).

    # Settings of derived towers, fixed here.
    registers = 0  # learned tokens after the class token
    class_position = True  # whether the class token has a position embedding
    inner_norm = False  # norms before the last linear map of both branches of a block
    can_be_naflex = True  # whether a tower for square images can take patches of other ratios

    positions_path = "visual/positional_embedding"
    has_tokens = has_linear_patches = True
    parts = (("projections", r"/conv1/(?!.*mlp)"),)
    embedding_parameters = ("proj", "proj_bias")

    def __post_init__(self) -> None:
        layers.check_sizes(
            self,
            "vision.",
            norm_epsilon="(0, inf)",
            layer_scale="(-inf, inf)",
            patch_dropout="[0, 1)",
        )
        if self.image_size < self.patch_size:
            raise InputError(
                f"vision.image_size={self.image_size} must be at least one patch "
                f"(vision.patch_size={self.patch_size})."
            )
        if self.width % self.num_heads:
            raise InputError(
                f"vision.width={self.width} is no multiple of vision.num_heads={self.num_heads}."
            )
        if self.projection_bias and not self.projection:
            raise InputError("vision.projection_bias=True needs vision.projection=True.")
        if self.pool == "class_token" and not self.class_token:
            raise InputError(
                "vision.pool='class_token' needs vision.class_token=True; set it, or pool='mean'."
            )

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.width // self.num_heads

    @property
    def grid(self) -> int:
        """Rows and columns of position embeddings."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image, with padding."""
        return self.max_patches or self.grid**2

    @property
    def kept_patches(self) -> int:
        """Patches left by patch dropout in training, at least one."""
        return max(round(self.num_patches * (1 - self.patch_dropout)), 1)

    @property
    def extra_tokens(self) -> int:
        """Tokens before those of the patches."""
        return self.class_token + self.registers

    @property
    def extra_positions(self) -> int:
        """Position embeddings before those of the patches."""
        return int(self.class_token and self.class_position)

    @property
    def map_sizes(self) -> tuple[int, int]:
        """Number of attention heads and width of the MLP with pool=map."""
        return self.num_heads, self.mlp_width

    @property
    def patch_macs(self) -> int:
        """Multiply-adds that turn the pixels of one patch into a token."""
        return self.patch_size**2 * 3 * self.width

    @property
    def short_name(self) -> str:
        return f"ViT-w{self.width}d{self.depth}p{self.patch_size}"

    @property
    def summary(self) -> str:
        return (
            f"ViT of width {self.width}, depth {self.depth}, patches of {self.patch_size} pixels, "
            f"{self.activation}, {self.pool} pooling"
        )

    @property
    def num_layers(self) -> int:
        return self.depth

    @property
    def first_layers(self) -> Mapping[str, int]:
        tokens = ("class_embedding", "registers", "positional_embedding")
        return dict.fromkeys(("conv1", *tokens, "ln_pre"), 0) | {"transformer": 1}

    @property
    def attention_tokens(self) -> int:
        return self.kept_patches + self.extra_tokens

    def caption_tokens(self, *, training: bool = False) -> int:
        if self.pool == "queries":
            return self.pool_queries - 1
        patches = self.kept_patches if training else self.num_patches
        return patches + (self.pool in ("map", "mean_all")) * self.extra_tokens

    @property
    def pads_caption_tokens(self) -> bool:
        return self.is_naflex and self.pool != "queries"

    def pooled_width(self, embed_dim: int) -> int:
        return embed_dim if self.pool == "queries" else self.width

    def unprojected(self: AnyViT, embed_dim: int, params: Arrays) -> tuple[AnyViT, int, Arrays]:
        """As the CLIP paper's linear probes: features before the projection."""
        if not self.projection:
            return self, embed_dim, params
        tower = replace(self, projection=False, projection_bias=False)
        width = self.pooled_width(embed_dim)
        return tower, width, {name: x for name, x in params.items() if "proj" not in name}

    def with_max_patches(self: AnyViT, max_patches: int | None) -> AnyViT:
        if self.max_patches is not None or max_patches is None:
            return replace(self, max_patches=max_patches)
        if not self.can_be_naflex:
            return super().with_max_patches(max_patches)
        # Pixels beyond the last full patch, which a fixed resolution may have, are in no size.
        size = self.grid * self.patch_size
        return replace(self, image_size=size, max_patches=max_patches)

    def with_patch_dropout(self: AnyViT, fraction: float) -> AnyViT:
        return replace(self, patch_dropout=fraction)

    def with_image_size(self: AnyViT, image_size: int) -> AnyViT:
        if self.max_patches is not None and image_size % self.patch_size:
            raise InputError(
                f"image_size={image_size} is not a multiple of vision.patch_size="
                f"{self.patch_size}; a NaFlex model needs full patches. Choose another size."
            )
        return replace(self, image_size=image_size, max_patches=None)

    def resize_grid(self, grid: Float[Any, "N D"], side: int) -> Float[Any, "n D"]:
        """Resize position embeddings; those of a NaFlex tower as it does for such an image."""
        if self.max_patches is None:
            return super().resize_grid(grid, side)
        return resize_positions(jnp.asarray(grid), jnp.array([[side, side]]), side * side)[0]

    def patch_attention(self, weights: Arrays, length: Lengths) -> Float[Array, "B L"]:
        """Attention rollout (arXiv:2005.00928): from the pooled token or tokens back through all
        blocks, each of which passes on one half by its residual and the other by its attention."""
        blocks = weights["transformer"]["resblocks"]["attn"]["weights"][0]  # [depth, B, L, L]
        extra, index = self.extra_tokens, jnp.arange(blocks.shape[-1])
        match self.pool:
            case "class_token":
                share = index == 0
            case "mean":
                share = index >= extra
            case "mean_all":
                share = index >= 0
            case "map":
                share = weights["attn_pool"]["weights"][0][:, 0]
            case "queries":
                share = weights["attn_pool"]["attn"]["weights"][0][:, 0]
        if length is not None:
            share = share * (index < jnp.maximum(length, 1)[:, None] + extra)
        share = jnp.broadcast_to(share, blocks.shape[1:3]).astype(jnp.float32)
        share = share / share.sum(1, keepdims=True)
        for attended in blocks[::-1]:
            share = (share + jnp.einsum("BL,BLT->BT", share, attended)) / 2
        return share[:, extra:]

    def check_width(self, embed_dim: int) -> None:
        if not self.projection and self.pooled_width(embed_dim) != embed_dim:
            raise InputError(
                f"vision.projection=False needs vision.width={self.width} to equal "
                f"embed_dim={embed_dim}."
            )
        if self.pool == "queries" and embed_dim % self.pool_heads:
            raise InputError(
                f"embed_dim={embed_dim} must be a multiple of vision.pool_heads={self.pool_heads}."
            )

    def module(self, embed_dim: int, remat: layers.Remat, unroll: int, layout: Layout) -> "ViT":
        return ViT(self, embed_dim, remat, unroll, layout)

    def stem(self, layout: Layout) -> nn.Module:
        """Return the module that turns patches `[B, L, P, Q, C]` into tokens."""
        patch = self.patch_size
        return Einsum(
            "BLPQC,PQCD->BLD",
            (patch, patch, 3, self.width),
            (self.width,) if self.patch_bias else None,
            uniform((patch * patch * 3) ** -0.5),
            einsum=layout.einsum,
            as_matrix=True,
        )

    def rotation(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the tables of `attention.Rotation` for all tokens; None: no rotary positions."""
        return None

    def block(self, layout: Layout) -> layers.BlockConfig:
        """Return the settings of the tower's blocks."""
        return layers.BlockConfig(
            self.num_heads,
            self.mlp_width,
            self.activation,
            self.norm_epsilon,
            layers.BlockInit.image(self.width, self.mlp_width),
            self.layer_scale,
            layout=layout,
        )

    def operations(self, embed_dim: int, *, training: bool = False) -> Operations:
        tokens = (self.kept_patches if training else self.num_patches) + self.extra_tokens
        projected = self.projection * self.pooled_width(embed_dim)
        # NaFlex resizes the position embeddings for each image by a matmul.
        resized = self.num_patches * self.grid**2 if self.max_patches else 0
        macs = self.num_patches * self.patch_macs + resized * self.width + projected * embed_dim
        ends = Operations(
            macs=macs,
            layer_norm=(self.pre_norm * tokens + 1) * self.width,
        )
        blocks = self.depth * layers.block_operations(
            tokens,
            self.width,
            self.mlp_width,
            gated=self.activation == "swiglu",
            inner_norm=self.inner_norm,
        )
        if self.pool not in HEADS:
            return ends + blocks
        return ends + blocks + HEADS[self.pool].operations(self, embed_dim, tokens, training)


def choose_patches(
    keys: Key[Array, " B"], patches: int, count: int, length: Lengths = None
) -> tuple[Int[Array, "B l"], Lengths]:
    """Choose at random which of each image's patches are kept; it depends on its key only.

    With `length`, the valid patches of each image, the same share of these is kept, first.
    """
    noise = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys)
    if length is not None:
        noise = jnp.where(jnp.arange(patches) < length[:, None], noise, jnp.inf)
        length = jnp.clip(jnp.round(length * (count / patches)).astype(jnp.int32), 1, count)
    return jnp.argsort(noise, axis=1)[:, :count], length  # top_k would gather from all devices


def resize_positions(
    table: Float[Array, "N D"], grid: Int[Any, "B 2"], patches: Any
) -> Float[Array, "B L D"]:
    """Resize a square table of position embeddings to each image's grid (rows, columns).

    Bilinear and antialiased, as `jax.image.scale_and_translate`, in float32. The filter is
    separable, so all grids take one product of static shape; the rest of `patches` (an integer, or
    symbolic at export) is padding.
    """
    side, grid = math.isqrt(len(table)), jnp.maximum(grid, 1)[:, :, None]

    def weights(index: Int[Array, "B L"], count: Int[Array, "B 1"]) -> Float[Array, "B L S"]:
        scale = side / count[:, :, None].astype(jnp.float32)
        centers = (index[:, :, None] + 0.5) * scale
        distance = jnp.abs(jnp.arange(side) + 0.5 - centers) / jnp.maximum(scale, 1)
        near = jnp.maximum(1 - distance, 0)
        return near / near.sum(-1, keepdims=True)

    row, column = jnp.divmod(jnp.arange(patches), grid[:, 1])
    row = jnp.minimum(row, grid[:, 0] - 1)  # also of padding, for finite weights
    down, across = weights(row, grid[:, 0]), weights(column, grid[:, 1])
    both = (down[:, :, :, None] * across[:, :, None]).reshape(*down.shape[:2], -1)
    return jnp.einsum(
        "BLN,ND->BLD", both, table.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )


class AttentionPool(nn.Module):
    """Attention of a learned query to all tokens, then a residual MLP (SigLIP's "MAP" head)."""

    config: ViTConfig
    embed_dim: int

    @staticmethod
    def operations(c: ViTConfig, embed_dim: int, tokens: int, training: bool) -> Operations:
        # The query's projections and MLP are of one token, ln_post of all tokens.
        return Operations(
            macs=2 * c.width * (c.width + tokens * (c.width + 1) + c.map_sizes[1]),
            attention=2 * c.width * tokens,
            layer_norm=tokens * c.width,
        )

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"], length: Lengths) -> Float[Array, "B D"]:
        c = self.config
        count, mlp_width = c.map_sizes
        heads = (count, c.width // count)
        init = uniform(c.width**-0.5)
        normal = named("- - -", nn.initializers.normal(c.width**-0.5))
        latent = self.param("latent", normal, (1, 1, c.width))
        q = Einsum("BLD,DNK->BLNK", (c.width, *heads), heads, init, init, name="q")(
            jnp.broadcast_to(latent.astype(x.dtype), (x.shape[0], 1, c.width))
        )
        kv = Einsum("BLD,DSNK->BLSNK", (c.width, 2, *heads), (2, *heads), init, init, name="kv")(x)
        layers.record(self, lambda: (q, kv[:, :, 0], length))
        x = jax.nn.dot_product_attention(q, kv[:, :, 0], kv[:, :, 1], key_value_seq_lengths=length)
        x = Einsum("BLNK,NKD->BLD", (*heads, c.width), (c.width,), init, init, name="proj")(x)
        init_fns = layers.BlockInit.image(c.width, mlp_width)
        mlp = layers.MLP(mlp_width, c.activation, init_fns, name="mlp")
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
    def __call__(self, x: Float[Array, "B L D"], length: Lengths) -> Float[Array, "B Q E"]:
        c = self.config
        normal = named("- -", nn.initializers.normal(1.0))
        query = self.param("query", normal, (c.pool_queries, self.embed_dim))
        query = LayerNorm(c.norm_epsilon, name="ln_q")(query.astype(x.dtype))
        init = uniform(self.embed_dim**-0.5)
        attn = CrossAttention(c.pool_heads, init, init, name="attn")
        x = LayerNorm(c.norm_epsilon, name="ln_k")(x)
        return attn(query[None], join_tokens(x, length))[0]


HEADS = {"map": AttentionPool, "queries": QueryPool}  # pools with parameters of their own


class ViT(nn.Module):
    """Vision transformer: patches, class token, positions, blocks, pooling, a projection."""

    config: ViTConfig
    embed_dim: int
    remat: layers.Remat = "none"
    unroll: int = 1
    layout: Layout = Layout()

    def setup(self) -> None:
        c = self.config
        self.conv1 = c.stem(self.layout)
        normal = nn.initializers.normal(c.width**-0.5)
        if c.class_token:
            self.class_embedding = self.param("class_embedding", named("-", normal), (c.width,))
        if c.registers:
            registers = (c.registers, c.width)
            self.registers = self.param("registers", named("- -", normal), registers)
        if c.positions_path is not None:
            positions = (c.grid**2 + c.extra_positions, c.width)
            self.positional_embedding = self.param(
                "positional_embedding", named("L -", normal), positions
            )
        if c.pre_norm:
            self.ln_pre = LayerNorm(c.norm_epsilon)
        block = c.block(self.layout)
        self.transformer = layers.Transformer(block, c.depth, self.remat, self.unroll)
        self.ln_post = LayerNorm(c.norm_epsilon)
        if c.pool in HEADS:
            self.attn_pool = HEADS[c.pool](c, self.embed_dim)
        if c.projection:
            shape = (c.pooled_width(self.embed_dim), self.embed_dim)
            self.proj = self.param("proj", named("D E", normal), shape)
        if c.projection_bias:
            bias = named("-", nn.initializers.zeros)
            self.proj_bias = self.param("proj_bias", bias, (self.embed_dim,))

    def table(self) -> Float[Array, "L D"] | None:
        """Return position embeddings of all tokens, zeros for registers; None: there are none."""
        c = self.config
        if c.positions_path is None:
            return None
        table, first = self.positional_embedding, c.extra_positions
        if c.extra_tokens == first:
            return table
        none = jnp.zeros((c.extra_tokens - first, c.width))
        return jnp.concatenate([table[:first], none, table[first:]])

    def keep(self, x: Float[Array, "B L D"], chosen: Int[Array, "B k"]) -> Float[Array, "B l D"]:
        """Keep the chosen patches, and all tokens before those of the patches."""
        extra = self.config.extra_tokens
        patches = jnp.take_along_axis(x[:, extra:], chosen[:, :, None], axis=1)
        return jnp.concatenate([x[:, :extra], patches], axis=1)

    def __call__(
        self,
        images: Images,
        keys: Key[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B E"]:
        """Embed images; with `keys` patch dropout applies, with `train` BatchNorm of a stem."""
        return self.pool_and_tokens(self.tokens(images, keys=keys, train=train)[0])[0]

    def tokens(
        self,
        images: Images,
        collect: bool = False,
        keys: Key[Array, " B"] | None = None,
        train: bool = False,
        masked: Masked | None = None,
    ) -> tuple[ImageTokens, Float[Array, "depth B L D"] | None]:
        """Return the last block's states, the class token's first; with `collect` every block's.

        With `keys`, one for each image, patch dropout applies. With `masked`, some patches are
        replaced before positions are added.
        """
        c = self.config
        c.image_spec.check(images)
        patch, extra, length = c.patch_size, c.extra_tokens, None
        table = self.table()
        if isinstance(images, Patches):
            x = rearrange(images.pixels, "B L (P Q C) -> B L P Q C", P=patch, Q=patch)
            length = jnp.maximum(images.length, 1)  # of padding of the batch, too
            if table is not None:
                resized = resize_positions(table[extra:], jnp.asarray(images.grid), x.shape[1])
                first = jnp.broadcast_to(table[:extra], (x.shape[0], extra, c.width))
                table = jnp.concatenate([first, resized], axis=1)
        else:
            # Pixels beyond the last full patch are cut, as by a strided convolution (SO400M@384).
            side = c.grid * patch
            x = rearrange(
                images[:, :side, :side], "B (h P) (w Q) C -> B (h w) P Q C", P=patch, Q=patch
            )
        x = self.conv1(x) if isinstance(self.conv1, Einsum) else self.conv1(x, train)
        if masked is not None:
            x = jnp.where(masked.patches[:, :, None], masked.token.astype(x.dtype), x)
        if extra:
            tokens = [self.class_embedding[None]] if c.class_token else []
            tokens += [self.registers] if c.registers else []
            token = (jnp.concatenate(tokens) if c.registers else tokens[0]).astype(x.dtype)
            token = jnp.broadcast_to(token, (x.shape[0], extra, c.width))
            x = jnp.concatenate([token, x], axis=1)
        x = x if table is None else x + table.astype(x.dtype)
        rotation = c.rotation()
        if keys is not None and c.patch_dropout:
            patches = x.shape[1] - extra
            count = max(round(patches * (1 - c.patch_dropout)), 1)
            chosen, length = choose_patches(keys, patches, count, length)
            x = self.keep(x, chosen)
            of_images = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(x), *a.shape)), rotation)
            rotation = jax.tree.map(lambda a: self.keep(a, chosen), of_images)
        if c.pre_norm:
            x = self.ln_pre(x)
        length = None if length is None else length + extra
        attended = length if rotation is None else attention.Rotation(*map(jnp.asarray, rotation))
        x, every = self.transformer(x, attended, collect=collect)
        return join_tokens(x, length), every

    def pool_and_tokens(self, tokens: ImageTokens) -> tuple[Float[Array, "B E"], ImageTokens]:
        """Norm, pool and project; return also the tokens that a caption decoder attends to."""
        c = self.config
        x, length = split_tokens(tokens)
        others, count = x[:, c.extra_tokens :], None if length is None else length - c.extra_tokens
        # OpenAI normalises after pooling, SigLIP before; for a class token it makes no difference.
        match c.pool:
            case "class_token":
                x, seen = self.ln_post(x[:, 0]), join_tokens(self.ln_post(others), count)
            case "mean":
                x, seen = self.ln_post(layers.mean(others, count)), join_tokens(others, count)
            case "mean_all":
                x, seen = self.ln_post(layers.mean(x, length)), tokens
            case "map":
                x = self.ln_post(x)
                x, seen = self.attn_pool(x, length), join_tokens(x, length)
            case "queries":
                x = self.ln_post(self.attn_pool(x, length))
                x, seen = x[:, 0], x[:, 1:]
        if c.projection:
            y = self.layout.einsum("BD,DE->BE", x, self.proj.astype(x.dtype))
            x = layers.adapt(self, x, y, "proj_")
        if c.projection_bias:
            x = x + self.proj_bias.astype(x.dtype)
        return x, seen
