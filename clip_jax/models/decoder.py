"""Captions beside the contrast: CoCa (arXiv:2205.01917) and MaMMUT (arXiv:2303.16839).

CoCa's decoder stands on the text tower, whose token states it takes; MaMMUT's is the text tower
itself, run a second time, causal and with an eye on the image.
"""

from dataclasses import dataclass
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from clip_jax.errors import check_ranges
from clip_jax.models import attention
from clip_jax.models.attention import KV
from clip_jax.models.layers import (
    MLP,
    STACKS,
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
        check_ranges(self, "decoder.", cross_every="[1, 200]")  # each is compiled


DecoderConfig = CoCaConfig | MaMMUTConfig


class Cache(NamedTuple):
    """What a layer keeps: keys and values of the tokens before, and of the image."""

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
        q = Einsum("BLD,DNK->BLNK", (width, *heads), heads, self.in_proj, self.bias_init, name="q")(
            x
        )
        if kv is not None:
            y = attention.kept(q.reshape(kv[0].shape[0], -1, *heads), kv)
        elif other is not None:
            both = Einsum(
                "BLD,DSNK->BLSNK", (other.shape[-1], 2, *heads), (2, *heads), self.in_proj,
                self.bias_init, name="kv",
            )(other)  # fmt: skip
            if q.shape[0] == 1:
                q = jnp.broadcast_to(q, (other.shape[0], *q.shape[1:]))
            y = jax.nn.dot_product_attention(
                q.reshape(other.shape[0], -1, *heads), both[:, :, 0], both[:, :, 1]
            )
            kv = (both[:, :, 0].swapaxes(1, 2), both[:, :, 1].swapaxes(1, 2))
        else:
            raise ValueError("CrossAttention needs what it attends to, or its keys and values.")
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
        return x, None if cache is None else Cache(tuple(own), kv)


class CrossTransformer(nn.Module):
    """A stack of layers, scanned: every parameter has a leading axis, the layers'.

    Returns its output. With `caches`, one of each layer, it returns them too as they are after it,
    and each layer has parameters of its own (see `layers.apart`); the first token brings the image,
    whose keys and values the caches then hold.
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
        caches: list[Cache] | None = None,
        place: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "R L D"], list[Cache] | None]:
        own = (self.config._replace(causal=causal), self.blocks, self.first_mlp)
        x = self.config.layout.place(x)
        if caches is None:
            stack = scanned(Layer, self.layers, self.remat, self.unroll, shared=3)
            return stack(*own, name=STACKS[1])(x, None, image, place)[0], None
        kept = []
        for i, cache in enumerate(caches):
            x, cache = Layer(*own, name=f"{STACKS[1]}_{i}")(x, cache, image, place)
            kept.append(cache)
        return x, cast(list[Cache], kept)


class Caption(NamedTuple):
    """What the decoding of captions keeps of the tokens before."""

    text: list[KV] | None  # of CoCa's text tower, block by block
    decoder: list[Cache]

    @classmethod
    def empty(
        cls, config: DecoderConfig, text: tuple[int, int, int], rows: int, length: int, dtype: DType
    ) -> "Caption":
        """Make room for `length` tokens of each row; `text` is the tower's depth, heads, width."""
        depth, heads, width = text

        def room(heads: int) -> KV:
            empty = jnp.zeros((rows, heads, length, width // heads), dtype)
            return empty, empty

        if isinstance(config, CoCaConfig):
            own = Cache((room(config.num_heads),))
            return cls([room(heads)] * depth, [own] * config.depth)
        own = Cache((room(heads),) * config.cross_every)
        return cls(None, [own] * (depth // config.cross_every))


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
        caches: list[Cache] | None = None,
        place: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "R L D"], list[Cache] | None]:
        x, caches = self.transformer(x, image, caches=caches, place=place)
        return self.ln_final(x), caches
