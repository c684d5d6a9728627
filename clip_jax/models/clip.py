"""CLIP as pure functions of a nested dict of parameters (paper, figure 3)."""

import math
from dataclasses import dataclass, field
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key, UInt8

from clip_jax.models.attention import Backend
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
    init_logit_scale: float = 1 / 0.07  # inverse temperature at the start (SigLIP: 10)
    init_logit_bias: float | None = None  # SigLIP: −10; None: no bias
    image_mean: tuple[float, float, float] = OPENAI_MEAN  # of RGB in [0, 1], subtracted
    image_std: tuple[float, float, float] = OPENAI_STD  # of RGB in [0, 1], divided by
    dtype: DType = "bfloat16"  # of the matmuls; parameters, norms and softmax are float32
    # What the backward pass computes again: nothing, all, all but queries, keys, values and what
    # attention makes of them, or all but the matmuls with weights.
    remat: Remat = "none"
    attention: Backend = "xla"  # in training; cudnn: GPUs, bfloat16; splash: TPUs, many tokens

    def __post_init__(self) -> None:
        if (
            isinstance(self.vision, ViTConfig)
            and not self.vision.projection
            and self.vision.width != self.embed_dim
        ):
            raise ValueError(
                f"vision.projection=False needs vision.width={self.vision.width} to equal "
                f"embed_dim={self.embed_dim}."
            )


class Towers(nn.Module):
    """Both towers and the logit scale under one tree of parameters."""

    config: CLIPConfig
    layout: Layout = Layout()

    def setup(self) -> None:
        c = self.config
        if isinstance(c.vision, ResNetConfig):
            self.visual = ModifiedResNet(c.vision, c.embed_dim, c.remat, self.layout)
        else:
            self.visual = ViT(c.vision, c.embed_dim, c.remat, self.layout)
        self.text = TextTransformer(c.text, c.embed_dim, c.dtype, c.remat, self.layout)
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

    def encode_text(self, tokens: Int[Array, "B L"]) -> Float[Array, "B E"]:
        return self.text(tokens)

    def image_tokens(
        self, images: Float[Array, "B H W C"], layer: int, norm: bool
    ) -> Float[Array, "B L D"]:
        if not isinstance(self.visual, ViT):
            raise ValueError("tokens of the image tower need a vision transformer, not a ResNet.")
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
        return self.text.ln_final(x) if norm else x

    def __call__(
        self, images: Float[Array, "B H W C"], tokens: Int[Array, "B L"]
    ) -> tuple[Float[Array, "B E"], Float[Array, "B E"]]:
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

    def _apply(self, params: Params, *args: Any, method: str) -> Array:
        return cast(
            Array, Towers(self.config, self.layout).apply(_variables(params), *args, method=method)
        )


def _layer(layer: int, depth: int, tower: str) -> int | None:
    """Return the block's index, None for the last, whose output needs no collecting."""
    if not -depth <= layer < depth:
        raise ValueError(
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
