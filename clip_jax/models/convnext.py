"""Image tower: ConvNeXt (arXiv:2201.03545), as in open_clip."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from einops import rearrange
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from clip_jax.errors import InputError
from clip_jax.models import layers
from clip_jax.models.layers import Activation, LayerNorm, Layout, Operations, Remat, named, uniform
from clip_jax.models.tower import ImageTowerConfig


@dataclass(frozen=True, kw_only=True)
class ConvNeXtConfig(ImageTowerConfig):
    """Image tower: ConvNeXt. The defaults are those of ConvNeXt-Base."""

    layers: tuple[int, int, int, int] = (3, 3, 27, 3)  # Blocks per stage.
    width: int = 128  # Channels of the first stage; each stage has twice as many as the one before.
    # What follows pooling. linear: a linear map. mlp: two linear maps around GELU.
    head: Literal["linear", "mlp"] = "linear"
    activation: Activation = "gelu"  # MLP activation.
    norm_epsilon: float = 1e-6  # Epsilon of LayerNorm.
    layer_scale: float | None = 1e-6  # Initial gain of residual branches. None: no gains.

    pool = "mean"
    embedding_parameters = ("proj",)
    parts = (("convolutions", r"/conv\d"),)

    def __post_init__(self) -> None:
        layers.check_sizes(self, "vision.", norm_epsilon="(0, inf)", layer_scale="(-inf, inf)")
        if self.image_size % 32:
            raise InputError(
                f"vision.image_size={self.image_size} is not a multiple of 32, the stride of a "
                "ConvNeXt; round it to one."
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage."""
        return tuple(self.width * 2**stage for stage in range(4))

    @property
    def short_name(self) -> str:
        return f"ConvNeXt-w{self.width}"

    @property
    def summary(self) -> str:
        return f"ConvNeXt of width {self.width}, layers {self.layers}, {self.activation}"

    @property
    def num_layers(self) -> int:
        return sum(self.layers)

    @property
    def first_layers(self) -> Mapping[str, int]:
        """Each block is a layer; what is before a stage counts to its first block."""
        numbers = {"conv0": 0, "ln0": 0, "stage0": 1}
        for stage, below in enumerate(itertools.accumulate(self.layers[:-1]), 1):
            numbers |= dict.fromkeys((f"conv{stage}", f"ln{stage}", f"stage{stage}"), below + 1)
        return numbers

    def pooled_width(self, embed_dim: int) -> int:
        return 2 * embed_dim if self.head == "mlp" else self.widths[-1]

    def module(self, embed_dim: int, remat: Remat, unroll: int, layout: Layout) -> "ConvNeXt":
        return ConvNeXt(self, embed_dim, remat, unroll, layout)

    def operations(self, embed_dim: int, *, training: bool = False) -> Operations:
        size, inputs, total = self.image_size // 4, 3 * 16, Operations()
        for stage, (depth, width) in enumerate(zip(self.layers, self.widths, strict=True)):
            if stage:
                size, inputs = size // 2, 4 * self.widths[stage - 1]
            macs = inputs * width + depth * width * (49 + 8 * width)
            norms = depth * width + (inputs if stage else width)
            total += size**2 * Operations(macs=macs, layer_norm=norms)
        width, hidden = self.widths[-1], self.pooled_width(embed_dim)
        macs = hidden * embed_dim + (self.head == "mlp") * width * hidden
        return total + Operations(macs=macs, layer_norm=width)


class ConvNeXtBlock(nn.Module):
    """x + scale(mlp(ln(depthwise convolution of x)))."""

    stack = layers.STACKS[0]
    config: layers.BlockConfig
    collect: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W D"], cache: None, other: None, position: None
    ) -> tuple[Float[Array, "B H W D"], None]:
        c, width = self.config, x.shape[-1]
        y = nn.Conv(
            width,
            (7, 7),
            feature_group_count=width,
            dtype=x.dtype,
            name="conv",
            kernel_init=named("P Q C D", uniform(1 / 7)),
            bias_init=named("-", uniform(1 / 7)),
            conv_general_dilated=c.layout.conv,
        )(x)
        y = LayerNorm(c.epsilon, name="ln")(checkpoint_name(y, "attended"))
        y = layers.MLP(c.mlp_width, c.activation, c.init_fns, name="mlp")(y)
        if c.layer_scale is not None:
            y = layers.LayerScale(c.layer_scale, name="ls")(y)
        return checkpoint_name(c.layout.constrain(x + y), "residual"), None


class ConvNeXt(nn.Module):
    """ConvNeXt: a stem of patches, four stages, the mean, LayerNorm, a projection."""

    config: ConvNeXtConfig
    embed_dim: int
    remat: Remat = "none"
    unroll: int = 1
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        keys: Key[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B E"]:
        """Embed images. `keys` and `train` have no effect."""
        c = self.config
        c.image_spec.check(images)
        norm: Any = functools.partial(LayerNorm, c.norm_epsilon)
        x = images
        for stage, (depth, width) in enumerate(zip(c.layers, c.widths, strict=True)):
            x = norm(name=f"ln{stage}")(x) if stage else x
            x = self.patches(x, 2 if stage else 4, width, f"conv{stage}")
            x = x if stage else norm(name="ln0")(x)
            init = layers.BlockInit.image(width, 4 * width)
            block = layers.BlockConfig(
                1, 4 * width, c.activation, c.norm_epsilon, init, c.layer_scale, layout=self.layout
            )
            x, _ = layers.Transformer(
                block, depth, self.remat, self.unroll, ConvNeXtBlock, name=f"stage{stage}"
            )(x)
        x = norm(name="ln_post")(x.mean((1, 2)))
        if c.head == "mlp":
            hidden = c.pooled_width(self.embed_dim)
            init = uniform(c.widths[-1] ** -0.5)
            shape = (c.widths[-1], hidden)
            fc = layers.Einsum("BD,DE->BE", shape, (hidden,), init, init, name="fc")
            x = layers.gelu(fc(x))
        shape, init = (x.shape[-1], self.embed_dim), nn.initializers.normal(x.shape[-1] ** -0.5)
        proj = self.param("proj", named("D E", init), shape)
        return self.layout.einsum("BD,DE->BE", x, proj.astype(x.dtype))

    def patches(
        self, x: Float[Array, "B H W C"], size: int, width: int, name: str
    ) -> Float[Array, "B h w D"]:
        """Apply a convolution whose stride is its size."""
        side, init = x.shape[1] // size, uniform((size * size * x.shape[-1]) ** -0.5)
        patches = rearrange(x, "B (h P) (w Q) C -> B (h w) P Q C", P=size, Q=size)
        shape = (size, size, x.shape[-1], width)
        y = layers.Einsum(
            "BLPQC,PQCD->BLD", shape, (width,), init, init, einsum=self.layout.einsum, name=name
        )(patches)
        return rearrange(y, "B (h w) D -> B h w D", h=side)
