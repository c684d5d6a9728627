"""Captions beside the contrast: CoCa (arXiv:2205.01917) and MaMMUT (arXiv:2303.16839).

CoCa's decoder stands on the text tower, whose token states it takes; MaMMUT's is the text tower
itself, run a second time, causal and with an eye on the image. The configs say what is built of
either, and how the text tower changes with it.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from clip_jax.errors import InputError, check_ranges
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
    Layout,
    Operations,
    Remat,
    Transformer,
    block_operations,
    named,
)  # fmt: skip
from clip_jax.models.text import TextConfig, TextTransformer


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
        else:
            assert other is not None
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
        x = checkpoint_name(c.layout.constrain(x + y), "residual")
        mlp = MLP(c.mlp_width, c.activation, c.init_fns, name="mlp")
        return c.layout.constrain(x + mlp(LayerNorm(c.epsilon, name="ln_2")(x))), kv


class Layer(nn.Module):
    """A block, one that attends to the image, and further blocks; without an image none does.

    The first token brings the image, whose keys and values the cache then holds.
    """

    stack = STACKS[1]
    config: BlockConfig
    blocks: int = 1
    first_mlp: bool = True
    causal: bool | None = None  # None: as the config says
    collect: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L D"],
        cache: Cache | None,
        image: Float[Array, "B M C"] | None,
        position: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "R L D"], Cache | None]:
        if self.collect:
            raise InputError("states of single blocks of MaMMUT's text tower are not kept.")
        c, (own, kv) = self.config, ([], None if cache is None else cache.image)
        causal = c.causal if self.causal is None else self.causal
        for i in range(self.blocks):
            config = c._replace(mlp=i > 0 or self.first_mlp, causal=causal)
            kept = None if cache is None else cache.own[i]
            x, kept = Block(config, name=f"self_{i}")(x, kept, None, position)
            own.append(kept)
            if i == 0 and (image is not None or kv is not None):
                x, kv = CrossBlock(c, name="cross")(x, image, kv)
        return x, None if cache is None else Cache(tuple(own), kv)


def _cross_operations(
    tokens: int, width: int, mlp_width: int, seen: int, image_width: int
) -> Operations:
    """Count one block that attends to `seen` tokens of an image."""
    return Operations(
        macs=2 * tokens * width * (width + seen + mlp_width) + 2 * seen * image_width * width,
        layer_norm=2 * tokens * width + seen * image_width,
    )


def _vocabulary_operations(text: TextConfig, tokens: int) -> Operations:
    """Count the norm and the comparison with every word that end both decoders."""
    return Operations(macs=tokens * text.width * text.vocab_size, layer_norm=tokens * text.width)


def _empty(text: TextConfig, heads: int, rows: int, length: int, dtype: DType) -> KV:
    empty = jnp.zeros((rows, heads, length, text.width // heads), dtype)
    return empty, empty


class Caption(NamedTuple):
    """What the decoding of captions keeps of the tokens before."""

    text: list[KV] | None  # of CoCa's text tower, block by block
    decoder: list[Cache]


# ------------------------------------------------------------------ CoCa


@dataclass(frozen=True, kw_only=True)
class CoCaConfig:
    """Layers of the text tower's width above it, each of which also attends to the image."""

    depth: int = 12  # layers, of a causal block and one that attends to the image
    num_heads: int = 8  # attention heads
    mlp_ratio: float = 4.0  # MLP width / width

    def __post_init__(self) -> None:
        check_ranges(self, "decoder.", depth="[1, inf)", num_heads="[1, inf)", mlp_ratio="(0, inf)")

    def check(self, text: TextConfig, image_width: int) -> None:
        """Raise InputError unless it fits the text tower and the image's tokens."""
        if text.width % self.num_heads:
            raise InputError(
                f"text.width={text.width} is not divisible by decoder.num_heads={self.num_heads}."
            )
        if image_width != text.width or not text.causal:
            raise InputError(
                f"CoCa's decoder needs text.causal=True, got {text.causal}, and image tokens "
                f"of text.width={text.width}, got {image_width}: embed_dim where "
                "vision.pool='queries', else vision.width."
            )

    def modules(
        self, text: TextConfig, image_width: int, options: dict[str, Any]
    ) -> tuple[TextTransformer, nn.Module]:
        """Build the text tower and the decoder; `options` are the fields of a `TextTransformer`."""
        return TextTransformer(text, **options), CoCaDecoder(
            self, text, options["remat"], options["unroll"], options["layout"]
        )

    def text_operations(self, text: TextConfig, embed_dim: int, tokens: int) -> Operations:
        """Count the text tower, for one text."""
        return text.operations(embed_dim, tokens)

    def operations(self, text: TextConfig, tokens: int, seen: int, image_width: int) -> Operations:
        """Count the decoder for one caption that sees `seen` image tokens."""
        width, mlp_width = text.width, int(text.width * self.mlp_ratio)
        layer = block_operations(tokens, width, mlp_width)
        layer += _cross_operations(tokens, width, mlp_width, seen, image_width)
        return self.depth * layer + _vocabulary_operations(text, tokens)

    def empty_cache(self, text: TextConfig, rows: int, length: int, dtype: DType) -> Caption:
        """Make room for the keys and values of `length` tokens of each row."""
        own = Cache((_empty(text, self.num_heads, rows, length, dtype),))
        blocks = [_empty(text, text.num_heads, rows, length, dtype)] * text.depth
        return Caption(blocks, [own] * self.depth)


class CoCaDecoder(nn.Module):
    """From the text tower's token states to states of which the next token is read off."""

    config: CoCaConfig
    text: TextConfig  # whose activation and LayerNorm's ε it shares
    remat: Remat
    unroll: int
    layout: Layout

    def setup(self) -> None:
        c, width = self.config, self.text.width
        block = self.text.block(self.layout)._replace(
            num_heads=c.num_heads, mlp_width=int(width * c.mlp_ratio),
            init_fns=BlockInit.text(width, c.depth),
        )  # fmt: skip
        self.transformer = Transformer(block, c.depth, self.remat, self.unroll, Layer)
        self.ln_final = LayerNorm(block.epsilon)
        init = named("D V", nn.initializers.normal(width**-0.5))
        self.vocab_projection = self.param("vocab_projection", init, (width, self.text.vocab_size))

    def embed_and_write(
        self, tower: TextTransformer, tokens: Int[Array, "B L"], image: Float[Array, "B M C"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B l D"]]:
        """Embed texts, and return the decoder's states of all their tokens but the last."""
        states, _ = tower.states(tokens)
        written, _ = self.transformer(states[:, : tokens.shape[1] - 1], image)
        return tower.pool(states, tokens), self.ln_final(written)

    def step(
        self, tower: TextTransformer, tokens: Int[Array, "R 1"],
        image: Float[Array, "B M C"] | None, cache: Caption, position: Int[Array, ""],
    ) -> tuple[Float[Array, "R 1 D"], Caption]:  # fmt: skip
        """Return the state of one more token, and the cache with it."""
        x = tower.embed(tokens, position)
        x, text = tower.transformer(x, caches=cache.text, position=position)
        x, own = self.transformer(x, image, caches=cache.decoder, position=position)
        return self.ln_final(x), Caption(text, own)


# ------------------------------------------------------------------ MaMMUT


@dataclass(frozen=True, kw_only=True)
class MaMMUTConfig:
    """The text tower twice: as it is for the contrast; causal, and seeing the image, to write."""

    cross_every: int = 2  # text blocks for each block that attends to the image, behind the first
    # The MLP of those text blocks that are followed by one that attends to the image.
    first_mlp: bool = True

    def __post_init__(self) -> None:
        check_ranges(self, "decoder.", cross_every="[1, 200]")  # each is compiled

    def check(self, text: TextConfig, image_width: int) -> None:
        """Raise InputError unless it fits the text tower."""
        if text.has_class_token or text.depth % self.cross_every:
            raise InputError(
                f"decoder.cross_every={self.cross_every} needs text.depth={text.depth} "
                f"to be a multiple, and text.pool={text.pool!r} another than class_token."
            )

    def modules(
        self, text: TextConfig, image_width: int, options: dict[str, Any]
    ) -> tuple[TextTransformer, nn.Module]:
        """Build the text tower and what it needs to write, of a `TextTransformer`'s fields."""
        fields = (self.cross_every, self.first_mlp)
        tower = TextTransformer(text, **options, block=Layer, fields=fields, blocks=fields[0])
        return tower, MaMMUTDecoder(image_width, text.width, text.vocab_size)

    def text_operations(self, text: TextConfig, embed_dim: int, tokens: int) -> Operations:
        """Count the text tower without the image, for one text."""
        return text.operations(embed_dim, tokens, self._blocks(text, tokens))

    def operations(self, text: TextConfig, tokens: int, seen: int, image_width: int) -> Operations:
        """Count the decoder for one caption that sees `seen` image tokens."""
        crossed = _cross_operations(tokens, text.width, text.mlp_width, seen, text.width)
        projected = Operations(macs=seen * image_width * text.width)
        blocks = self._blocks(text, tokens) + (text.depth // self.cross_every) * crossed
        return blocks + projected + _vocabulary_operations(text, tokens)

    def _blocks(self, text: TextConfig, tokens: int) -> Operations:
        first, later = (
            block_operations(tokens, text.width, text.mlp_width, mlp)
            for mlp in (self.first_mlp, True)
        )
        return (text.depth // self.cross_every) * (first + (self.cross_every - 1) * later)

    def empty_cache(self, text: TextConfig, rows: int, length: int, dtype: DType) -> Caption:
        """Make room for the keys and values of `length` tokens of each row."""
        own = Cache((_empty(text, text.num_heads, rows, length, dtype),) * self.cross_every)
        return Caption(None, [own] * (text.depth // self.cross_every))


DecoderConfig = CoCaConfig | MaMMUTConfig


class MaMMUTDecoder(nn.Module):
    """What MaMMUT's text tower needs to write: the image in its width, and a word for a state."""

    image_width: int
    width: int
    vocab_size: int

    def setup(self) -> None:
        # LAION draws it from a unit normal, which training from scratch should not copy.
        init = named("D -", nn.initializers.normal(self.image_width**-0.5))
        self.image_projection = self.param("image_projection", init, (self.image_width, self.width))
        init = named("D V", nn.initializers.normal(self.width**-0.5))
        self.vocab_projection = self.param("vocab_projection", init, (self.width, self.vocab_size))

    def embed_and_write(
        self, tower: TextTransformer, tokens: Int[Array, "B L"], image: Float[Array, "B M C"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B l D"]]:
        """Embed texts, and return the decoder's states of all their tokens but the last."""
        return tower(tokens), self._run(tower, tokens[:, :-1], image)[0]

    def step(
        self, tower: TextTransformer, tokens: Int[Array, "R 1"],
        image: Float[Array, "B M C"] | None, cache: Caption, position: Int[Array, ""],
    ) -> tuple[Float[Array, "R 1 D"], Caption]:  # fmt: skip
        """Return the state of one more token, and the cache with it."""
        x, own = self._run(tower, tokens, image, cache.decoder, position)
        return x, Caption(None, own)

    def _run(
        self, tower: TextTransformer, tokens: Array, image: Array | None,
        caches: list[Cache] | None = None, position: Array | None = None,
    ) -> tuple[Array, Any]:  # fmt: skip
        if image is not None:
            image = image @ self.image_projection.astype(image.dtype)
        x = tower.embed(tokens, position)
        x, caches = tower.transformer(x, image, caches=caches, position=position, causal=True)
        return tower.ln_final(x), caches
