"""The caption decoder of CapPa (Tschannen et al. 2023, arXiv:2306.07915), with parallel prediction.

It has a table of tokens of its own, and reads the image alone, not the text tower. In training, a
share of the captions is predicted in parallel: every input is a mask, and attention goes both ways,
so that the image must tell each token. The other captions are predicted token by token. SigLIP 2
trains such a decoder beside its sigmoid loss (arXiv:2502.14786, section 2.2).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from clip_jax.errors import InputError
from clip_jax.models import layers
from clip_jax.models.decoder import (
    Cache,
    Caption,
    CaptionDecoderConfig,
    CrossAttention,
    ImageKV,
    cross_operations,
    empty_kv,
)
from clip_jax.models.images import ImageTokens
from clip_jax.models.layers import BlockConfig, BlockInit, LayerNorm, Operations, named
from clip_jax.models.text import TextConfig, TextTransformer

EPSILON = 1e-6  # of LayerNorm, as in Flax


@dataclass(frozen=True, kw_only=True)
class CapPaConfig(CaptionDecoderConfig):
    """CapPa's caption decoder, which predicts a share of the training captions in parallel."""

    width: int = 768  # Channels of the residual stream.
    depth: int = 6  # Number of layers: each is self-attention, cross-attention and an MLP.
    num_heads: int = 12  # Number of attention heads.
    mlp_ratio: float = 4.0  # Width of the MLP divided by that of the residual stream.
    # Probability that a training caption is predicted in parallel (CapPa: 0.75, SigLIP 2: 0.5).
    parallel: float = 0.75
    bias: bool = False  # Whether the layers' LayerNorms and MLPs have biases; attention has none.

    start: ClassVar[int | None] = 0

    def __post_init__(self) -> None:
        layers.check_sizes(self, "decoder.", parallel="[0, 1]")
        if self.width % self.num_heads:
            raise InputError(
                f"decoder.width={self.width} must be a multiple of "
                f"decoder.num_heads={self.num_heads}."
            )

    def modules(
        self, text: TextConfig, image_width: int, options: dict[str, Any]
    ) -> tuple[TextTransformer, nn.Module]:
        """Build the text tower and the decoder; `options` are the fields of a `TextTransformer`."""
        names = ("dtype", "remat", "unroll", "layout")
        return text.module(**options), CapPaDecoder(self, text, *(options[name] for name in names))

    @property
    def num_layers(self) -> int:
        return self.depth

    @property
    def first_layers(self) -> Mapping[str, int]:
        return {"token_embedding": 0, "positional_embedding": 0, "transformer": 1}

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    def block(self, layout: layers.Layout) -> BlockConfig:
        """Return what its layers need."""
        linear, xavier = nn.initializers.lecun_normal(), nn.initializers.xavier_uniform()
        return BlockConfig(
            num_heads=self.num_heads,
            mlp_width=self.mlp_width,
            activation="gelu_tanh",
            epsilon=EPSILON,
            init_fns=BlockInit(as_matrix(linear), as_matrix(linear, -1), xavier, xavier),
            layout=layout,
        )

    def text_layers(self, depth: int) -> int:
        """Return the number of layers of a text tower of `depth` blocks."""
        return depth

    def text_operations(self, text: TextConfig, embed_dim: int, tokens: int) -> Operations:
        """Count the operations of the text tower for one text."""
        return text.operations(embed_dim, tokens)

    def operations(self, text: TextConfig, tokens: int, seen: int, image_width: int) -> Operations:
        """Count the decoder's operations for one caption that attends to `seen` image tokens."""
        layer = layers.block_operations(tokens, self.width, self.mlp_width)
        # Without the MLP and the norm of the image that other cross-attention blocks have.
        layer += cross_operations(tokens, self.width, 0, seen, image_width)
        saved = Operations(layer_norm=-(tokens * self.width + seen * image_width))
        words = Operations(
            macs=tokens * self.width * text.vocab_size, layer_norm=tokens * self.width
        )
        return self.depth * (layer + saved) + words

    def labels(self, text: TextConfig, tokens: Int[Array, "B L"]) -> Int[Array, "B l"]:
        return super().labels(text, self._begun(text, tokens))

    def inputs(self, text: TextConfig, tokens: Int[Array, "B L"]) -> Int[Array, "B l"]:
        return super().inputs(text, self._begun(text, tokens))

    def num_labels(self, text: TextConfig) -> int:
        return text.context_length - (text.begin_id is not None)

    def _begun(self, text: TextConfig, tokens: Int[Array, "B L"]) -> Int[Array, "B l"]:
        """Put the start before texts whose tokenizer has no begin of text."""
        if text.begin_id is not None:
            return tokens
        return jnp.pad(tokens, ((0, 0), (1, 0)), constant_values=self.start)

    def empty_cache(self, text: TextConfig, rows: int, length: int, dtype: layers.DType) -> Caption:
        """Return an empty KV cache for `length` tokens of each row."""
        layer = Cache((empty_kv(self.width, self.num_heads, rows, length, dtype),))
        return Caption(None, [layer] * self.depth)


class CapPaLayer(nn.Module):
    """x + self-attention(ln_1(x)), then + cross-attention(ln_2(x), image), then + mlp(ln_3(x))."""

    stack = layers.STACKS[1]
    config: BlockConfig
    bias: bool = False
    collect: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "R L D"],
        cache: Cache | None,
        other: tuple[ImageTokens | None, Bool[Array, "R L L"] | None],
        position: Int[Array, ""] | None,
    ) -> tuple[Float[Array, "R L D"], Cache | None]:
        c, (image, mask) = self.config, other

        def norm(number: int) -> LayerNorm:
            return LayerNorm(c.epsilon, self.bias, name=f"ln_{number}")

        attn = layers.Attention(
            c.num_heads,
            c.init_fns,
            causal=mask is None,
            layout=c.layout,
            biases="none",
            out_bias=False,
            name="attn",
        )
        before: Any = None if cache is None else cache.blocks[0]
        y, after = attn(norm(1)(x), mask, before, position)
        x = checkpoint_name(c.layout.constrain(x + y), "residual")
        inits = (c.init_fns.in_proj, c.init_fns.out_proj)
        cross = CrossAttention(c.num_heads, *inits, use_bias=False, name="attn_cross")
        kv: ImageKV | None = None if cache is None else cache.image
        y, kv = cross(norm(2)(x), image, kv)
        x = checkpoint_name(c.layout.constrain(x + y), "residual")
        sizes = (c.mlp_width, c.activation, c.init_fns)
        mlp = layers.MLP(*sizes, use_bias=self.bias, name="mlp")
        x = c.layout.constrain(x + mlp(norm(3)(x)))
        return x, None if after is None else Cache((after,), kv)


class CapPaDecoder(nn.Module):
    """Map image tokens and captions to states that predict the captions' tokens."""

    config: CapPaConfig
    text: TextConfig  # of the tokens
    dtype: layers.DType
    remat: layers.Remat
    unroll: int
    layout: layers.Layout

    def setup(self) -> None:
        c, normal = self.config, nn.initializers.normal
        rows = self.text.vocab_size + (c.parallel > 0)  # the last is that of the mask
        self.token_embedding = self.param(
            "token_embedding", named("- W", normal(1.0)), (rows, c.width)
        )
        self.positional_embedding = self.param(
            "positional_embedding",
            named("L -", normal(c.width**-0.5)),
            (self.text.context_length, c.width),
        )
        stack = (c.block(self.layout), c.depth, self.remat, self.unroll, CapPaLayer, (c.bias,))
        self.transformer = layers.Transformer(*stack)
        self.ln_final = LayerNorm(EPSILON)
        shape = (c.width, self.text.vocab_size)
        zeros = nn.initializers.zeros
        self.vocab_projection = self.param("vocab_projection", named("D V", zeros), shape)
        self.vocab_bias = self.param("vocab_bias", named("-", zeros), shape[1:])

    def embed_and_write(
        self,
        tower: TextTransformer,
        tokens: Int[Array, "B L"],
        image: ImageTokens,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B E"], Float[Array, "B l D"]]:
        """Embed texts, and return the decoder's states, which predict `CapPaConfig.labels`.

        With `keys`, one for each text, some texts are predicted in parallel.
        """
        inputs = self.config.inputs(self.text, tokens)
        mask = None
        if keys is not None and self.config.parallel > 0:
            drawn = jax.vmap(jax.random.uniform)(keys)
            is_parallel = (drawn < self.config.parallel)[:, None]
            inputs = jnp.where(is_parallel, self.text.vocab_size, inputs)
            length = inputs.shape[1]
            mask = jnp.tri(length, dtype=bool) | is_parallel[:, None]
        states, _ = self.transformer(self._embed(inputs), (image, mask))
        return tower(tokens), self.ln_final(states)

    def step(
        self,
        tower: TextTransformer,
        tokens: Int[Array, "R 1"],
        image: ImageTokens | None,
        cache: Caption,
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "R 1 D"], Caption]:
        """Return the state of one more token, and the cache with it."""
        x = self._embed(tokens, position)
        caches = {"caches": cache.decoder, "position": position}
        x, decoder = self.transformer(x, (image, None), **caches)
        return self.ln_final(x), Caption(None, decoder)

    def _embed(
        self, tokens: Int[Array, "B l"], position: Int[Array, ""] | None = None
    ) -> Float[Array, "B l D"]:
        positions, length = self.positional_embedding, tokens.shape[1]
        if position is None:
            positions = positions[:length]
        else:
            positions = jax.lax.dynamic_slice_in_dim(positions, position, length)
        return (self.layout.lookup(self.token_embedding, tokens) + positions).astype(self.dtype)


def as_matrix(init: layers.Init, contracted: int = 1) -> layers.Init:
    """Draw an array of several axes as the matrix of its first axes and the rest.

    `contracted` is the number of first axes, or minus that of the last ones that are not.
    """

    def draw(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        rows = math.prod(shape[:contracted])
        return init(key, (rows, math.prod(shape) // rows), dtype).reshape(shape)

    return draw
