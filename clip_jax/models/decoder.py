"""Captions beside the contrast: CoCa (arXiv:2205.01917) and MaMMUT (arXiv:2303.16839).

CoCa's decoder stands on the text tower, whose token states it takes; MaMMUT's is the text tower
itself, run a second time, causal and with an eye on the image.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from clip_jax.models.layers import (
    KV,
    MLP,
    Block,
    BlockConfig,
    BlockInit,
    DType,
    Einsum,
    Init,
    LayerNorm,
    Remat,
    scanned,
)  # fmt: skip
from clip_jax.refused import check_ranges


@dataclass(frozen=True, kw_only=True)
class CoCaConfig:
    """Layers of the text tower's width above it, each of which also attends to the image."""

    depth: int = 12  # layers, of a causal block and one that attends to the image
    num_heads: int = 8  # attention heads
    mlp_ratio: float = 4.0  # MLP width / width

    def __post_init__(self) -> None:
        check_ranges(self, "decoder.", depth="[1, inf)", num_heads="[1, inf)", mlp_ratio="(0, inf)")


@dataclass(frozen=True, kw_only=True)
class MaMMUTConfig:
    """The text tower twice: as it is for the contrast; causal, and seeing the image, to write."""

    cross_every: int = 2  # text blocks for each block that attends to the image, behind the first
    # The MLP of those text blocks that are followed by one that attends to the image.
    first_mlp: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, "decoder.", cross_every="[1, inf)")


DecoderConfig = CoCaConfig | MaMMUTConfig


class Cache(NamedTuple):
    """What a layer keeps: keys and values of the tokens before, and of the image.

    Stacked, of all layers: with a leading axis.
    """

    own: tuple[KV, ...]  # of each of its blocks
    image: KV | None = None  # None: not yet computed


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another, whose width may be another."""

    num_heads: int
    in_proj: Init
    out_init: Init
    bias_init: Init = nn.initializers.zeros

    @nn.compact
    def __call__(
        self, x: Float[Array, "R L D"], other: Float[Array, "B M C"] | None, kv: KV | None = None
    ) -> tuple[Float[Array, "r L D"], KV]:
        """Attend to `other`, or to its keys and values, which are returned too.

        x may have several rows for each of the others' (beams of one image), one after the other,
        or one for all.
        """
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        if kv is None and other is not None:
            kv = Einsum(
                "BLD,DSNK->BLSNK", (other.shape[-1], 2, *heads), (2, *heads), self.in_proj,
                self.bias_init, name="kv",
            )(other)  # fmt: skip
        if kv is None:
            raise ValueError("CrossAttention needs what it attends to, or its keys and values.")
        q = Einsum("BLD,DNK->BLNK", (width, *heads), heads, self.in_proj, self.bias_init, name="q")(
            x
        )
        if q.shape[0] == 1:
            q = jnp.broadcast_to(q, (kv.shape[0], *q.shape[1:]))
        y = jax.nn.dot_product_attention(
            q.reshape(kv.shape[0], -1, *heads), kv[:, :, 0], kv[:, :, 1]
        )
        return Einsum("BLNK,NKD->BLD", (*heads, width), (width,), self.out_init, name="out_proj")(
            checkpoint_name(y.reshape(q.shape), "attended")
        ), kv


class CrossBlock(nn.Module):
    """x + attention(ln_1(x), ln_1_kv(image)), then x + mlp(ln_2(x))."""

    config: BlockConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "R L D"], image: Float[Array, "B M C"] | None, kv: KV | None
    ) -> tuple[Float[Array, "R L D"], KV]:
        c = self.config
        attn = CrossAttention(c.num_heads, c.init_fns.in_proj, c.init_fns.out_proj, name="attn")
        if kv is None and image is not None:
            image = LayerNorm(c.epsilon, name="ln_1_kv")(image)
        y, kv = attn(LayerNorm(c.epsilon, name="ln_1")(x), image, kv)
        x = checkpoint_name(c.layout.place(x + y), "residual")
        mlp = MLP(c.mlp_width, c.activation, c.init_fns, name="mlp")
        return c.layout.place(x + mlp(LayerNorm(c.epsilon, name="ln_2")(x))), kv


class Layer(nn.Module):
    """A block, one that attends to the image, and further blocks; without an image none does."""

    config: BlockConfig
    blocks: int
    first_mlp: bool

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L D"],
        cache: Cache | None,
        image: Float[Array, "B M C"] | None,
        place: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "R L D"], Cache | None]:
        own, kv = [], None if cache is None else cache.image
        for i in range(self.blocks):
            config = self.config._replace(mlp=i > 0 or self.first_mlp)
            kept = None if cache is None else cache.own[i]
            x, kept = Block(config, name=f"self_{i}")(x, kept, None, place)
            own.append(kept)
            if i == 0 and (image is not None or kv is not None):
                x, kv = CrossBlock(self.config, name="cross")(x, image, kv)
        if cache is None:
            return x, None
        # Given, the image's keys and values need not be copied for the next token.
        return x, Cache(tuple(own), kv if cache.image is None else None)


class CrossTransformer(nn.Module):
    """A stack of layers, scanned: every parameter has a leading axis, the layers'.

    Returns its output, and with `cache` the caches after it (see `Attention`); the first token
    brings the image, whose keys and values the cache then holds.
    """

    config: BlockConfig
    layers: int
    blocks: int = 1
    first_mlp: bool = True
    remat: Remat = "none"
    unroll: int = 1

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L D"],
        image: Float[Array, "B M C"] | None = None,
        *,
        causal: bool = True,
        cache: Cache | None = None,
        place: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "R L D"], Cache | None]:
        config = self.config._replace(causal=causal)
        stack = scanned(Layer, self.layers, self.remat, self.unroll, broadcast=2)(
            config, self.blocks, self.first_mlp, name="layers"
        )
        x, new = stack(self.config.layout.place(x), cache, image, place)
        if cache is not None and cache.image is not None:
            new = new._replace(image=cache.image)
        return x, new


class Caption(NamedTuple):
    """What the decoding of captions keeps of the tokens before."""

    text: Float[Array, "depth B T S N K"] | None  # of CoCa's text tower
    decoder: Cache

    @classmethod
    def empty(
        cls, config: DecoderConfig, text: tuple[int, int, int], rows: int, length: int, dtype: DType
    ) -> "Caption":
        """Make room for `length` tokens of each row; `text` is the tower's depth, heads, width."""
        depth, heads, width = text

        def room(layers: int, heads: int) -> Array:
            return jnp.zeros((layers, rows, length, 2, heads, width // heads), dtype)

        if isinstance(config, CoCaConfig):
            own = (room(config.depth, config.num_heads),)
            return cls(room(depth, heads), Cache(own))
        layers = depth // config.cross_every
        return cls(None, Cache((room(layers, heads),) * config.cross_every))


class MaMMUTDecoder(nn.Module):
    """What MaMMUT's text tower needs to write: the image in its width, and a word for a state."""

    image_width: int
    width: int
    vocab_size: int

    def setup(self) -> None:
        # LAION draws it from a unit normal, which training from scratch should not copy.
        init = nn.initializers.normal(self.image_width**-0.5)
        self.image_projection = self.param("image_projection", init, (self.image_width, self.width))
        init = nn.initializers.normal(self.width**-0.5)
        self.vocab_projection = self.param("vocab_projection", init, (self.width, self.vocab_size))

    def __call__(self, image: Float[Array, "B M C"]) -> Float[Array, "B M D"]:
        return image @ self.image_projection.astype(image.dtype)


class CoCaDecoder(nn.Module):
    """From the text tower's token states to states of which the next token is read off."""

    config: CoCaConfig
    width: int
    vocab_size: int
    block: BlockConfig  # of the text tower, whose activation and LayerNorm's ε it shares
    remat: Remat = "none"
    unroll: int = 1

    def setup(self) -> None:
        c = self.config
        block = self.block._replace(
            num_heads=c.num_heads, mlp_width=int(self.width * c.mlp_ratio),
            init_fns=BlockInit.text(self.width, c.depth),
        )  # fmt: skip
        self.transformer = CrossTransformer(block, c.depth, remat=self.remat, unroll=self.unroll)
        self.ln_final = LayerNorm(block.epsilon)
        init = nn.initializers.normal(self.width**-0.5)
        self.vocab_projection = self.param("vocab_projection", init, (self.width, self.vocab_size))

    def __call__(
        self,
        x: Float[Array, "R L D"],
        image: Float[Array, "B M C"] | None,
        cache: Cache | None = None,
        place: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "R L D"], Cache | None]:
        x, cache = self.transformer(x, image, cache=cache, place=place)
        return self.ln_final(x), cache
