"""Caption decoders of CoCa (arXiv:2205.01917) and MaMMUT (arXiv:2303.16839).

CoCa's decoder takes the token states of the text tower; MaMMUT's is the text tower itself, run a
second time with a causal mask and cross-attention to the image. The configs build the decoder and
the text tower that belongs to it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from clip_jax.errors import InputError, check_ranges
from clip_jax.models import attention, layers
from clip_jax.models.attention import KV
from clip_jax.models.images import ImageTokens, join_tokens, split_tokens
from clip_jax.models.layers import BlockConfig, DType, Einsum, Init, LayerNorm, Operations, named
from clip_jax.models.text import TextConfig, TextTransformer
from clip_jax.models.tower import TowerConfig

IGNORED = -1  # label of positions that no loss counts
# Keys and values of image tokens, and the numbers of valid ones if images differ in these.
ImageKV = KV | tuple[*KV, Int[Array, " B"]]


class Cache(NamedTuple):
    """KV cache of a layer: keys and values of the tokens before, and of the image."""

    blocks: tuple[KV, ...]
    image: ImageKV | None = None  # None: not yet computed


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another, whose width may differ."""

    num_heads: int
    in_proj: Init
    out_init: Init
    bias_init: Init = nn.initializers.zeros
    use_bias: bool = True

    @nn.compact
    def __call__(
        self, x: Float[Array, "R L D"], other: ImageTokens | None, kv: ImageKV | None = None
    ) -> tuple[Float[Array, "r L D"], ImageKV]:
        """Attend to `other`, or to its keys and values `kv`; return these, too.

        x may have several adjacent rows for each row of `other` (beams of one image), or one row
        for all.
        """
        width = x.shape[-1]
        heads = (self.num_heads, width // self.num_heads)
        q = Einsum(
            "BLD,DNK->BLNK",
            (width, *heads),
            heads if self.use_bias else None,
            self.in_proj,
            self.bias_init,
            name="q",
        )(x)
        if kv is not None:
            keys, values, *length = kv
            seen = jnp.arange(keys.shape[2]) < length[0][:, None, None, None] if length else None
            y = attention.to_cached(q.reshape(keys.shape[0], -1, *heads), (keys, values), seen)
        else:
            assert other is not None
            other, length = split_tokens(other)
            both = Einsum(
                "BLD,DSNK->BLSNK",
                (other.shape[-1], 2, *heads),
                (2, *heads) if self.use_bias else None,
                self.in_proj,
                self.bias_init,
                name="kv",
            )(other)
            if q.shape[0] == 1:
                q = jnp.broadcast_to(q, (other.shape[0], *q.shape[1:]))
            queries = q.reshape(other.shape[0], -1, *heads)
            layers.record(self, lambda: (queries, both[:, :, 0], length))
            y = jax.nn.dot_product_attention(
                queries,
                both[:, :, 0],
                both[:, :, 1],
                key_value_seq_lengths=length,
            )
            kv = (both[:, :, 0].swapaxes(1, 2), both[:, :, 1].swapaxes(1, 2))
            kv = kv if length is None else (*kv, length)
        out_bias = (width,) if self.use_bias else None
        out = Einsum("BLNK,NKD->BLD", (*heads, width), out_bias, self.out_init, name="out_proj")
        return out(checkpoint_name(y.reshape(q.shape), "attended")), kv


class CrossBlock(nn.Module):
    """x + attention(ln_1(x), ln_1_kv(image)), then x + mlp(ln_2(x))."""

    config: BlockConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "R L D"], image: ImageTokens | None, kv: ImageKV | None
    ) -> tuple[Float[Array, "R L D"], ImageKV]:
        c = self.config
        attn = CrossAttention(c.num_heads, c.init_fns.in_proj, c.init_fns.out_proj, name="attn")
        if kv is None and image is not None:
            states, length = split_tokens(image)
            image = join_tokens(LayerNorm(c.epsilon, name="ln_1_kv")(states), length)
        y, kv = attn(LayerNorm(c.epsilon, name="ln_1")(x), image, kv)
        x = checkpoint_name(c.layout.constrain(x + y), "residual")
        mlp = layers.MLP(c.mlp_width, c.activation, c.init_fns, name="mlp")
        return c.layout.constrain(x + mlp(LayerNorm(c.epsilon, name="ln_2")(x))), kv


class Layer(nn.Module):
    """A block, a cross-attention block (skipped without an image), and further blocks.

    With a cache, the image comes with the first token; then the cache holds its keys and values.
    """

    stack = layers.STACKS[1]
    config: BlockConfig
    blocks: int = 1
    first_mlp: bool = True
    causal: bool | None = None  # None: the config's
    collect: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L D"],
        cache: Cache | None,
        image: ImageTokens | None,
        position: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "R L D"], Cache | None]:
        if self.collect:
            raise InputError(
                "MaMMUT's text tower does not return the states of single blocks; "
                "use a model with another decoder, or with none."
            )
        c, kv = self.config, None if cache is None else cache.image
        caches: list[Any] = []
        causal = c.causal if self.causal is None else self.causal
        for i in range(self.blocks):
            config = c._replace(mlp=i > 0 or self.first_mlp, causal=causal)
            before = None if cache is None else cache.blocks[i]
            x, after = layers.Block(config, name=f"self_{i}")(x, before, None, position)
            caches.append(after)
            if i == 0 and (image is not None or kv is not None):
                x, kv = CrossBlock(c, name="cross")(x, image, kv)
        return x, None if cache is None else Cache(tuple(caches), kv)


def cross_operations(
    tokens: int, width: int, mlp_width: int, seen: int, image_width: int
) -> Operations:
    """Count the operations of a block with cross-attention to `seen` image tokens."""
    return Operations(
        macs=2 * tokens * width * (width + seen + mlp_width) + 2 * seen * image_width * width,
        attention=2 * tokens * width * seen,
        layer_norm=2 * tokens * width + seen * image_width,
    )


def _vocabulary_operations(text: TextConfig, tokens: int) -> Operations:
    """Count the operations of the last norm and of the logits, alike in both decoders."""
    return Operations(macs=tokens * text.width * text.vocab_size, layer_norm=tokens * text.width)


def empty_kv(width: int, heads: int, rows: int, length: int, dtype: DType) -> KV:
    """Return keys and values of `length` tokens that are still to be computed."""
    empty = jnp.zeros((rows, heads, length, width // heads), dtype)
    return empty, empty


class Caption(NamedTuple):
    """KV cache of caption decoding."""

    text: list[KV] | None  # one per block of CoCa's text tower; MaMMUT: None
    decoder: list[Cache]


@dataclass(frozen=True, kw_only=True)
class CaptionDecoderConfig(TowerConfig):
    """What all caption decoders answer."""

    # Settings of some decoders, fixed for all others.
    parallel = 0.0  # probability of parallel prediction in training, by keys of the batch's rows
    start: ClassVar[int | None] = (
        None  # first input without a begin of text; None: there must be one
    )
    extends_text = False  # whether it continues the text tower's own pass, as CoCa does
    trains_text = False  # whether captions train parameters of the text tower, too
    own_paths: ClassVar[tuple[str, ...]] = ("decoder",)  # parameters that captions alone train

    def check(self, text: TextConfig, image_width: int) -> None:
        """Raise InputError unless the decoder fits the text tower and the image tokens."""

    def labels(self, text: TextConfig, tokens: Int[Array, "B L"]) -> Int[Array, "B l"]:
        """Return the tokens that the decoder's states predict; IGNORED for padding.

        Where the end of text is also the padding, the first one counts.
        """
        labels = tokens[:, 1:]
        is_padding = labels == text.tokenizer.pad_id
        if text.end_id == text.tokenizer.pad_id:
            is_padding &= jnp.cumsum(is_padding, axis=1) > 1
        return jnp.where(is_padding, IGNORED, labels)

    def inputs(self, text: TextConfig, tokens: Int[Array, "B L"]) -> Int[Array, "B l"]:
        """Return the tokens from which `labels` are predicted, each from those up to its own."""
        return tokens[:, :-1]

    def num_labels(self, text: TextConfig) -> int:
        """Return the length of `labels`."""
        return text.context_length - 1


# ------------------------------------------------------------------ CoCa


@dataclass(frozen=True, kw_only=True)
class CoCaConfig(CaptionDecoderConfig):
    """CoCa's caption decoder: layers with cross-attention to the image after the text tower."""

    depth: int = 12  # Number of layers: each is a causal and a cross-attention block.
    num_heads: int = 8  # Number of attention heads.
    mlp_ratio: float = 4.0  # Width of the MLP divided by that of the text tower.

    extends_text = True
    trains_text = True

    def __post_init__(self) -> None:
        layers.check_sizes(self, "decoder.")

    def check(self, text: TextConfig, image_width: int) -> None:
        """Raise InputError unless the decoder fits the text tower and the image tokens."""
        if text.width % self.num_heads:
            raise InputError(
                f"text.width={text.width} must be a multiple of decoder.num_heads={self.num_heads}."
            )
        if image_width != text.width or not text.causal:
            raise InputError(
                f"CoCa's decoder needs text.causal=True, got {text.causal}, and image tokens "
                f"of text.width={text.width}, got {image_width}: set embed_dim (with "
                "vision.pool='queries') or vision.width to the same width."
            )

    def modules(
        self, text: TextConfig, image_width: int, options: dict[str, Any]
    ) -> tuple[TextTransformer, nn.Module]:
        """Build the text tower and the decoder; `options` are the fields of a `TextTransformer`."""
        return TextTransformer(text, **options), CoCaDecoder(
            self, text, options["remat"], options["unroll"], options["layout"]
        )

    @property
    def num_layers(self) -> int:
        return self.depth

    @property
    def first_layers(self) -> Mapping[str, int]:
        return {"transformer": 1}

    def text_layers(self, depth: int) -> int:
        """Return the number of layers of a text tower of `depth` blocks."""
        return depth

    def text_operations(self, text: TextConfig, embed_dim: int, tokens: int) -> Operations:
        """Count the operations of the text tower for one text."""
        return text.operations(embed_dim, tokens)

    def operations(self, text: TextConfig, tokens: int, seen: int, image_width: int) -> Operations:
        """Count the decoder's operations for one caption that attends to `seen` image tokens."""
        width, mlp_width = text.width, int(text.width * self.mlp_ratio)
        layer = layers.block_operations(tokens, width, mlp_width)
        layer += cross_operations(tokens, width, mlp_width, seen, image_width)
        return self.depth * layer + _vocabulary_operations(text, tokens)

    def empty_cache(self, text: TextConfig, rows: int, length: int, dtype: DType) -> Caption:
        """Return an empty KV cache for `length` tokens of each row."""
        layer = Cache((empty_kv(text.width, self.num_heads, rows, length, dtype),))
        blocks = [empty_kv(text.width, text.num_heads, rows, length, dtype)] * text.depth
        return Caption(blocks, [layer] * self.depth)


class CoCaDecoder(nn.Module):
    """Map the text tower's token states to states that predict the next token."""

    config: CoCaConfig
    text: TextConfig  # the decoder has its activation and LayerNorm's ε
    remat: layers.Remat
    unroll: int
    layout: layers.Layout

    def setup(self) -> None:
        c, width = self.config, self.text.width
        block = self.text.block(self.layout)._replace(
            num_heads=c.num_heads,
            mlp_width=int(width * c.mlp_ratio),
            init_fns=layers.BlockInit.text(width, c.depth),
        )
        self.transformer = layers.Transformer(block, c.depth, self.remat, self.unroll, Layer)
        self.ln_final = LayerNorm(block.epsilon)
        init = named("D V", nn.initializers.normal(width**-0.5))
        self.vocab_projection = self.param("vocab_projection", init, (width, self.text.vocab_size))

    def embed_and_write(
        self,
        tower: TextTransformer,
        tokens: Int[Array, "B L"],
        image: ImageTokens,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B l D"]]:
        """Embed texts, and return the decoder's states of all their tokens but the last."""
        states, _ = tower.states(tokens)
        written, _ = self.transformer(states[:, : tokens.shape[1] - 1], image)
        return tower.pool(states, tokens), self.ln_final(written)

    def step(
        self,
        tower: TextTransformer,
        tokens: Int[Array, "R 1"],
        image: ImageTokens | None,
        cache: Caption,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "R 1 D"], Caption]:
        """Return the state of one more token, and the cache with it."""
        x = tower.embed(tokens, position)
        x, text = tower.transformer(x, caches=cache.text, position=position)
        x, decoder = self.transformer(x, image, caches=cache.decoder, position=position)
        return self.ln_final(x), Caption(text, decoder)


# ------------------------------------------------------------------ MaMMUT


@dataclass(frozen=True, kw_only=True)
class MaMMUTConfig(CaptionDecoderConfig):
    """MaMMUT's caption decoder: the text tower itself, causal and with cross-attention."""

    trains_text = True
    own_paths = "decoder", "text/transformer/layers/cross"

    cross_every: int = 2  # Text blocks per cross-attention block, which follows the first.
    first_mlp: bool = True  # Whether text blocks before a cross-attention block have an MLP.

    def __post_init__(self) -> None:
        check_ranges(self, "decoder.", cross_every="[1, 200]")  # each block is compiled

    def check(self, text: TextConfig, image_width: int) -> None:
        """Raise InputError unless the decoder fits the text tower."""
        if text.has_class_token or text.depth % self.cross_every:
            raise InputError(
                f"MaMMUT needs text.depth={text.depth} to be a multiple of decoder.cross_every="
                f"{self.cross_every} and another text.pool than 'class_token', got {text.pool!r}."
            )

    def modules(
        self, text: TextConfig, image_width: int, options: dict[str, Any]
    ) -> tuple[TextTransformer, nn.Module]:
        """Build the text tower and the decoder; `options` are the fields of a `TextTransformer`."""
        fields = (self.cross_every, self.first_mlp)
        tower = TextTransformer(text, **options, block=Layer, fields=fields, blocks=fields[0])
        return tower, MaMMUTDecoder(image_width, text.width, text.vocab_size)

    @property
    def first_layers(self) -> Mapping[str, int]:
        return {}

    def text_layers(self, depth: int) -> int:
        """Return the number of layers, several blocks each, of a text tower of `depth` blocks."""
        return depth // self.cross_every

    def text_operations(self, text: TextConfig, embed_dim: int, tokens: int) -> Operations:
        """Count the operations of the text tower for one text, without the image."""
        return text.operations(embed_dim, tokens, self._blocks(text, tokens))

    def operations(self, text: TextConfig, tokens: int, seen: int, image_width: int) -> Operations:
        """Count the decoder's operations for one caption that attends to `seen` image tokens."""
        crossed = cross_operations(tokens, text.width, text.mlp_width, seen, text.width)
        projected = Operations(macs=seen * image_width * text.width)
        blocks = self._blocks(text, tokens) + (text.depth // self.cross_every) * crossed
        return blocks + projected + _vocabulary_operations(text, tokens)

    def _blocks(self, text: TextConfig, tokens: int) -> Operations:
        first, later = (
            layers.block_operations(tokens, text.width, text.mlp_width, mlp)
            for mlp in (self.first_mlp, True)
        )
        return (text.depth // self.cross_every) * (first + (self.cross_every - 1) * later)

    def empty_cache(self, text: TextConfig, rows: int, length: int, dtype: DType) -> Caption:
        """Return an empty KV cache for `length` tokens of each row."""
        layer = Cache(
            (empty_kv(text.width, text.num_heads, rows, length, dtype),) * self.cross_every
        )
        return Caption(None, [layer] * (text.depth // self.cross_every))


class MaMMUTDecoder(nn.Module):
    """Projections that MaMMUT's text tower needs for captions: of image tokens, to logits."""

    image_width: int
    width: int
    vocab_size: int

    def setup(self) -> None:
        # LAION uses a standard normal, which is too large for training from scratch.
        init = named("D -", nn.initializers.normal(self.image_width**-0.5))
        self.image_projection = self.param("image_projection", init, (self.image_width, self.width))
        init = named("D V", nn.initializers.normal(self.width**-0.5))
        self.vocab_projection = self.param("vocab_projection", init, (self.width, self.vocab_size))

    def embed_and_write(
        self,
        tower: TextTransformer,
        tokens: Int[Array, "B L"],
        image: ImageTokens,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B l D"]]:
        """Embed texts, and return the decoder's states of all their tokens but the last."""
        return tower(tokens), self._run(tower, tokens[:, :-1], image)[0]

    def step(
        self,
        tower: TextTransformer,
        tokens: Int[Array, "R 1"],
        image: ImageTokens | None,
        cache: Caption,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "R 1 D"], Caption]:
        """Return the state of one more token, and the cache with it."""
        x, decoder = self._run(tower, tokens, image, cache.decoder, position)
        return x, Caption(None, decoder)

    def _run(
        self,
        tower: TextTransformer,
        tokens: Array,
        image: ImageTokens | None,
        caches: list[Cache] | None = None,
        position: Array | None = None,
    ) -> tuple[Array, Any]:
        if image is not None:
            states, length = split_tokens(image)
            image = join_tokens(states @ self.image_projection.astype(states.dtype), length)
        x = tower.embed(tokens, position)
        x, caches = tower.transformer(x, image, caches=caches, position=position, causal=True)
        return tower.ln_final(x), caches
