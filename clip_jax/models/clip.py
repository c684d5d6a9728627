"""CLIP as pure functions of a nested dict of parameters (paper, figure 3)."""

import math
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, UInt8

from clip_jax.errors import InputError, check_ranges
from clip_jax.models.attention import Backend
from clip_jax.models.decoder import (
    Caption,
    CoCaDecoder,
    DecoderConfig,
    MaMMUTConfig,
    MaMMUTDecoder,
)
from clip_jax.models.layers import DType, Layout, Remat
from clip_jax.models.resnet import ModifiedResNet, ResNetConfig
from clip_jax.models.text import TextConfig, TextTransformer
from clip_jax.models.vit import ViT, ViTConfig

Params = dict[str, Any]

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class CLIPConfig:
    """Two towers and the embedding space they share."""

    embed_dim: int = 512  # dimensions of the shared space
    vision: ViTConfig | ResNetConfig = field(default_factory=ViTConfig)
    text: TextConfig = field(default_factory=TextConfig)
    decoder: DecoderConfig | None = None  # writes captions: CoCa's or MaMMUT's; None: none
    init_logit_scale: float = 1 / 0.07  # inverse temperature at the start (SigLIP: 10)
    init_logit_bias: float | None = None  # SigLIP: −10; None: no bias
    image_mean: tuple[float, float, float] = OPENAI_MEAN  # of RGB in [0, 1], subtracted
    image_std: tuple[float, float, float] = OPENAI_STD  # of RGB in [0, 1], divided by
    dtype: DType = "bfloat16"  # of the matmuls; parameters, norms and softmax are float32
    # What is kept for the backward pass, the rest is computed again. none: all is kept; hidden: of
    # each block q, k, v, what attention makes of them, the residual and the MLP's hidden state;
    # residual: not the last; attention: q, k, v and what attention makes of them; full: nothing.
    remat: Remat = "none"
    unroll: int = 1  # blocks in one turn of a tower's loop: more are faster, and compile longer
    # In training; auto: by device and length. short, splash: TPUs; cudnn: GPUs, bfloat16.
    attention: Backend = "auto"

    def __post_init__(self) -> None:
        check_ranges(
            self, "model.",
            embed_dim="[1, inf)", unroll="[1, inf)",
            init_logit_scale="(0, inf)", init_logit_bias="(-inf, inf)",
            image_mean="(-inf, inf)", image_std="(0, inf)",
        )  # fmt: skip
        if (
            isinstance(self.vision, ViTConfig)
            and not self.vision.projection
            and self.vision.width != self.embed_dim
        ):
            raise InputError(
                f"vision.projection=False needs vision.width={self.vision.width} to equal "
                f"embed_dim={self.embed_dim}."
            )
        if not self.text.projection and self.text.width != self.embed_dim:
            raise InputError(
                f"text.projection=False needs text.width={self.text.width} to equal "
                f"embed_dim={self.embed_dim}."
            )
        if isinstance(self.vision, ViTConfig) and self.vision.pool == "queries":
            _check_heads("embed_dim", self.embed_dim, "vision.pool_heads", self.vision.pool_heads)
        if self.decoder is not None:
            self._check_decoder(self.decoder)

    def _check_decoder(self, decoder: DecoderConfig) -> None:
        if isinstance(self.vision, ResNetConfig):
            raise InputError("decoder needs a vision transformer, not a ResNet: set model.vision.")
        if isinstance(decoder, MaMMUTConfig):
            if self.text.pool == "class_token" or self.text.depth % decoder.cross_every:
                raise InputError(
                    f"decoder.cross_every={decoder.cross_every} needs text.depth={self.text.depth} "
                    f"to be a multiple, and text.pool={self.text.pool!r} another than class_token."
                )
            return
        _check_heads("text.width", self.text.width, "decoder.num_heads", decoder.num_heads)
        if self.image_token_width != self.text.width or not self.text.causal:
            raise InputError(
                f"CoCa's decoder needs text.causal=True, got {self.text.causal}, and image tokens "
                f"of text.width={self.text.width}, got {self.image_token_width}: embed_dim where "
                "vision.pool='queries', else vision.width."
            )

    @property
    def has_logit_bias(self) -> bool:
        """Whether probabilities are the sigmoid's, of single pairs (SigLIP)."""
        return self.init_logit_bias is not None

    @property
    def image_token_width(self) -> int:
        """Channels of the tokens that a decoder attends to."""
        is_pooled = isinstance(self.vision, ViTConfig) and self.vision.pool == "queries"
        return self.embed_dim if is_pooled else self.vision.width


def _check_heads(width_name: str, width: int, name: str, heads: int) -> None:
    if width % heads:
        raise InputError(f"{width_name}={width} is not divisible by {name}={heads}.")


class Towers(nn.Module):
    """Both towers and the logit scale under one tree of parameters."""

    config: CLIPConfig
    layout: Layout = Layout()

    def setup(self) -> None:
        c = self.config
        if isinstance(c.vision, ResNetConfig):
            self.visual = ModifiedResNet(c.vision, c.embed_dim, c.remat, self.layout)
        else:
            self.visual = ViT(c.vision, c.embed_dim, c.remat, c.unroll, self.layout)
        mammut = c.decoder if isinstance(c.decoder, MaMMUTConfig) else None
        self.text = TextTransformer(
            c.text, c.embed_dim, c.dtype, c.remat, c.unroll, self.layout, mammut
        )  # fmt: skip
        if isinstance(c.decoder, MaMMUTConfig):
            self.decoder = MaMMUTDecoder(c.image_token_width, c.text.width, c.text.vocab_size)
        elif c.decoder is not None:
            self.decoder = CoCaDecoder(
                c.decoder, c.text.width, c.text.vocab_size, c.text.block(self.layout), c.remat,
                c.unroll,
            )  # fmt: skip
        scale = math.log(c.init_logit_scale)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(scale), ())
        if c.init_logit_bias is not None:
            bias = nn.initializers.constant(c.init_logit_bias)
            self.logit_bias = self.param("logit_bias", bias, ())

    def encode_image(
        self,
        images: Float[Array, "B H W C"],
        keys: Key[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B E"]:
        images = images.astype(self.config.dtype)
        if isinstance(self.visual, ModifiedResNet):
            return self.visual(images, train=train)
        return self.visual(images, keys)

    def encode_image_and_tokens(
        self, images: Float[Array, "B H W C"], keys: Key[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B E"], Float[Array, "B M D"]]:
        if not isinstance(self.visual, ViT):
            raise InputError("captions need a vision transformer, not a ResNet.")
        states, _ = self.visual.tokens(images.astype(self.config.dtype), keys=keys)
        return self.visual.pool_and_tokens(states)

    def encode_text_and_write(
        self, tokens: Int[Array, "B L"], image_tokens: Float[Array, "B M C"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B l D"]]:
        """Embed texts, and return the decoder's states of all their tokens but the last."""
        if isinstance(self.decoder, MaMMUTDecoder):
            return self.text(tokens), self.write(tokens[:, :-1], image_tokens)[0]
        states, _ = self.text.states(tokens)
        written, _ = self.decoder(states[:, : tokens.shape[1] - 1], image_tokens)
        return self.text.pool(states, tokens), written

    def write(
        self,
        tokens: Int[Array, "R L"],
        image_tokens: Float[Array, "B M C"] | None,
        cache: Caption | None = None,
        place: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "R L D"], Caption | None]:
        own = None if cache is None else cache.decoder
        if isinstance(self.decoder, MaMMUTDecoder):
            image = None if image_tokens is None else self.decoder(image_tokens)
            x, own = self.text.decode(tokens, image, own, place)
            return x, None if own is None else Caption(None, own)
        if cache is None or cache.text is None or place is None:
            x, _ = self.text.states(tokens)
            return self.decoder(x[:, : tokens.shape[1]], image_tokens)[0], None
        x, kept = self.text.step(tokens, cache.text, place)
        x, own = self.decoder(x, image_tokens, own, place)
        return x, None if own is None else Caption(kept, own)

    def encode_text(self, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        return self.text(tokens)

    def image_tokens(
        self, images: Float[Array, "B H W C"], layer: int, norm: bool
    ) -> Float[Array, "B L D"]:
        if not isinstance(self.visual, ViT):
            raise InputError("tokens of the image tower need a vision transformer, not a ResNet.")
        index = _layer(layer, self.visual.config.depth, "vision")
        images = images.astype(self.config.dtype)
        last, every = self.visual.tokens(images, collect=index is not None)
        x = last if every is None or index is None else every[index]
        return self.visual.ln_post(x) if norm else x

    def pool_image(self, states: Float[Array, "B L D"]) -> Float[Array, "B E"]:
        return self.visual.pool(states.astype(self.config.dtype))

    def text_tokens(
        self, tokens: Int[Array, "B L"], layer: int, norm: bool
    ) -> Float[Array, "B L D"]:
        index = _layer(layer, self.config.text.depth, "text")
        last, every = self.text.states(tokens, collect=index is not None)
        x = last if every is None or index is None else every[index]
        x = x[:, : tokens.shape[1]]  # without a class token's
        return self.text.ln_final(x) if norm else x

    def __call__(
        self, images: Float[Array, "B H W C"], tokens: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B E"]]:
        if self.config.decoder is not None:
            image_features, image_tokens = self.encode_image_and_tokens(images)
            return image_features, self.encode_text_and_write(tokens, image_tokens)[0]
        return self.encode_image(images), self.encode_text(tokens)


@dataclass(frozen=True)
class CLIP:
    """The model's functions for one architecture; hashable, so that `jit` can take it as static.

    Parameters are plain nested float32 dicts: `visual`, `text`, `logit_scale` (its logarithm, as
    OpenAI stores it) and, for SigLIP, `logit_bias`; for a ResNet also `batch_stats`, BatchNorm's
    running statistics, which no gradient trains. Features come back unnormalised, in float32.
    """

    config: CLIPConfig
    layout: Layout = Layout()  # on which mesh; the model itself knows none

    def init(self, key: Array) -> Params:
        """Draw parameters as OpenAI does; jit with `out_shardings` to shard them at birth."""
        c = self.config
        images = jnp.zeros((1, c.vision.image_size, c.vision.image_size, 3))
        tokens = jnp.zeros((1, c.text.context_length), jnp.int32)
        variables = cast(Params, Towers(c).init(key, images, tokens))
        return variables.pop("params") | variables

    def normalize(self, images: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Scale pixels to [0, 1], then by the model's mean and standard deviation."""
        c = self.config
        return (images.astype(jnp.float32) / 255 - jnp.array(c.image_mean)) / jnp.array(c.image_std)

    def encode_image(self, params: Params, images: Float[Array, "B H W C"]) -> Float[Array, "B E"]:
        """Embed normalised images `[B, H, W, 3]`."""
        return self._apply(params, images, method="encode_image").astype(jnp.float32)

    def encode_image_train(
        self, params: Params, images: Float[Array, "B H W C"], keys: Key[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B E"], Params]:
        """Embed normalised images as in training: BatchNorm takes its statistics from the batch.

        With `keys`, one for each image, a ViT drops patches as its config says. Returns features
        and the new `batch_stats` (for a ViT empty: there is nothing to write).
        """
        features, updates = Towers(self.config, self.layout).apply(
            _variables(params), images, keys, train=True, method="encode_image",
            mutable=["batch_stats"],
        )  # fmt: skip
        return features.astype(jnp.float32), updates.get("batch_stats", {})

    def encode_text(self, params: Params, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        """Embed token ids `[B, L]`, L at most the context length."""
        return self._apply(params, tokens, method="encode_text").astype(jnp.float32)

    def encode_image_and_tokens(
        self, params: Params, images: Float[Array, "B H W C"], keys: Key[Array, " B"] | None = None
    ) -> tuple[Float[Array, "B E"], Float[Array, "B M D"]]:
        """Embed normalised images, and return what the caption decoder attends to.

        With `keys` patches are dropped, as in `encode_image_train`.
        """
        features, tokens = self._apply(params, images, keys, method="encode_image_and_tokens")
        return features.astype(jnp.float32), tokens

    def encode_text_and_write(
        self, params: Params, tokens: Int[Array, "B L"], image_tokens: Float[Array, "B M C"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B l D"]]:
        """Embed texts; return also the decoder's states of all tokens but the last.

        Times `decoder/vocab_projection` those are the logits of the tokens that follow.
        """
        features, states = self._apply(params, tokens, image_tokens, method="encode_text_and_write")
        return features.astype(jnp.float32), states

    def decode_text(
        self, params: Params, tokens: Int[Array, "B L"], image_tokens: Float[Array, "B M C"]
    ) -> Float[Array, "B L V"]:
        """Return the logits of each token's successor, given an image and the tokens up to it."""
        self.needs_decoder()
        states, _ = self._apply(params, tokens, image_tokens, method="write")
        return self.vocabulary_logits(params, states)

    def decode_next(
        self,
        params: Params,
        tokens: Int[Array, " R"],
        image_tokens: Float[Array, "B M C"] | None,
        cache: Caption,
        place: Int[Array, ""],
    ) -> tuple[Float[Array, "R V"], Caption]:
        """Return the logits of what follows one more token, the one at `place` in its row.

        `params` are `apart`'s. Image tokens are needed with the first one only; then `cache` (see
        `empty_cache`) has them.
        There may be several rows for each image, one after the other.
        """
        states, cache = self._apply(
            params, tokens[:, None], image_tokens, cache, place, method="write"
        )
        return self.vocabulary_logits(params, states)[:, 0], cache

    def empty_cache(self, rows: int, length: int) -> Caption:
        """Make room for the keys and values of `length` tokens of each row."""
        c, text = self.config, self.config.text
        sizes = (text.depth, text.num_heads, text.width)
        return Caption.empty(self.needs_decoder(), sizes, rows, length, c.dtype)

    def vocabulary_logits(
        self, params: Params, states: Float[Array, "B L D"]
    ) -> Float[Array, "B L V"]:
        """Compare states of the decoder with every word."""
        kernel = params["decoder"]["vocab_projection"].astype(states.dtype)
        return self.layout.einsum("BLD,DV->BLV", states, kernel).astype(jnp.float32)

    def needs_decoder(self) -> DecoderConfig:
        """Return the decoder's configuration. Raises InputError if the model has none."""
        if self.config.decoder is None:
            raise InputError("this model writes no captions: it has no decoder (model.decoder).")
        return self.config.decoder

    def image_tokens(
        self, params: Params, images: Float[Array, "B H W C"], layer: int = -1, norm: bool = False
    ) -> Float[Array, "B L D"]:
        """Return the states after one block of a vision transformer, class token first if it has.

        `layer` counts from 0 or, negative, from the end (LLaVA takes −2); `norm` applies `ln_post`.
        """
        states = self._apply(params, images, layer, norm, method="image_tokens")
        return states.astype(jnp.float32)

    def pool_image(self, params: Params, states: Float[Array, "B L D"]) -> Float[Array, "B E"]:
        """Embed what `image_tokens` returns without `norm`, as `encode_image` does at the end."""
        return self._apply(params, states, method="pool_image").astype(jnp.float32)

    def text_tokens(
        self, params: Params, tokens: Int[Array, "B L"], layer: int = -1, norm: bool = False
    ) -> Float[Array, "B L D"]:
        """Return the states of all tokens after one block; `norm` applies `ln_final`.

        Diffusion models condition on these: Stable Diffusion 1 on the last block's with `norm`, 2
        on layer −2 with `norm`, XL on layer −2 as it is.
        """
        states = self._apply(params, tokens, layer, norm, method="text_tokens")
        return states.astype(jnp.float32)

    def _apply(self, params: Params, *args: Any, method: str) -> Any:
        return Towers(self.config, self.layout).apply(_variables(params), *args, method=method)


def _layer(layer: int, depth: int, tower: str) -> int | None:
    """Return the block's index, None for the last, whose output needs no collecting."""
    if not -depth <= layer < depth:
        raise InputError(
            f"layer={layer}: the {tower} tower has {depth} blocks, 0 to {depth - 1} "
            f"or −{depth} to −1."
        )
    return None if layer in (-1, depth - 1) else layer


def l2_normalize(x: Float[Array, "... E"]) -> Float[Array, "... E"]:
    """Scale vectors to unit length."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def _variables(params: Params) -> Params:
    """Sort our one tree into Flax's collections."""
    trainable, batch_stats = split_batch_stats(params)
    return {"params": trainable, "batch_stats": batch_stats}


def split_batch_stats(params: Params) -> tuple[Params, Params]:
    """Part a tree into what gradients train and BatchNorm's statistics (for a ViT empty)."""
    trainable = {name: tree for name, tree in params.items() if name != "batch_stats"}
    return trainable, params.get("batch_stats", {})


def join_batch_stats(trainable: Params, batch_stats: Params) -> Params:
    """Undo `split_batch_stats`."""
    return {**trainable, "batch_stats": batch_stats} if batch_stats else trainable


def count(params: Params) -> int:
    """Count the parameters of a tree (arrays or shapes), running statistics left out."""
    trainable, _ = split_batch_stats(params)
    return sum(math.prod(x.shape) for x in jax.tree.leaves(trainable))
