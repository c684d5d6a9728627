"""Image tower: a modified ResNet with attention pooling (CLIP paper, 2.4 and table 19)."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, reduce
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Key

from clip_jax.errors import InputError
from clip_jax.models import layers
from clip_jax.models.layers import Einsum, Init, Layout, Operations, Remat, named, uniform
from clip_jax.models.tower import ImageTowerConfig


@dataclass(frozen=True, kw_only=True)
class ResNetConfig(ImageTowerConfig):
    """Image tower: a modified ResNet with attention pooling. The defaults are those of RN50.

    The activation is always ReLU; QuickGELU is the text tower's.
    """

    layers: tuple[int, int, int, int] = (3, 4, 6, 3)  # Bottleneck blocks per stage.
    width: int = 64  # Channels after the stem; the last stage has 32 × as many.
    num_heads: int = 32  # Number of attention heads of the pooling.
    batch_norm_group: int | None = None  # Samples normalised together in training. None: batch.

    activation = "relu"
    pool = "attention"
    positions_path = "visual/attnpool/positional_embedding"
    extra_positions = 1  # the mean's, before those of the map
    embedding_parameters = ("attnpool/c_proj/kernel", "attnpool/c_proj/bias")
    parts = (
        ("norms", r"/(bn\d|\w*bn)/|batch_norm"),
        ("projections", r"/[qkv]_proj/"),
        ("convolutions", r"/(layer\d|conv\d|downsample)"),
    )

    def __post_init__(self) -> None:
        layers.check_sizes(self, "vision.", width="[2, 4096]")
        if self.image_size % 32:
            raise InputError(
                f"vision.image_size={self.image_size} is not a multiple of 32, "
                "the stride of a ResNet; round it to one."
            )
        if self.output_width % self.num_heads:
            raise InputError(
                f"32 × vision.width={self.width} must be a multiple of "
                f"vision.num_heads={self.num_heads}; change one of them."
            )

    @property
    def output_width(self) -> int:
        """Channels of the last stage and of the attention pooling."""
        return self.width * 32

    @property
    def head_width(self) -> int:
        """Channels of an attention head."""
        return self.output_width // self.num_heads

    @property
    def grid(self) -> int:
        """Rows and columns of the last map, and of position embeddings."""
        return self.image_size // 32

    @property
    def num_tokens(self) -> int:
        """Tokens of the attention pooling: the mean and every position of the last map."""
        return self.grid**2 + self.extra_positions

    @property
    def num_layers(self) -> int:
        return sum(self.layers)

    @property
    def first_layers(self) -> Mapping[str, int]:
        """Each block is a layer."""
        stages = enumerate(self.layers, 1)
        blocks = [f"layer{stage}/{i}" for stage, depth in stages for i in range(depth)]
        stem = [f"{kind}{i}" for kind in ("conv", "bn") for i in (1, 2, 3)]
        return dict.fromkeys(stem, 0) | {name: i for i, name in enumerate(blocks, 1)}

    @property
    def short_name(self) -> str:
        return f"RN-w{self.width}"

    @property
    def summary(self) -> str:
        return f"ResNet of width {self.width}, layers {self.layers}"

    def pooled_width(self, embed_dim: int) -> int:
        return self.output_width

    def module(self, embed_dim: int, remat: Remat, unroll: int, layout: Layout) -> "ModifiedResNet":
        return ModifiedResNet(self, embed_dim, remat, layout)

    def operations(self, embed_dim: int, *, training: bool = False) -> Operations:
        """Count the tower's operations for one image.

        In training the attention pooling has one query, the one that is used; published profiles
        count a query for every token, which is 5% more for RN50.
        """
        width, size = self.width, self.image_size // 2
        # Stem: three 3×3 convolutions, the first with stride 2, then 2×2 average pooling.
        macs = 9 * size**2 * (3 * (width // 2) + (width // 2) ** 2 + width // 2 * width)
        batch_norm = size**2 * 2 * width
        size, inputs = size // 2, width
        for stage, blocks in enumerate(self.layers):
            planes = width * 2**stage
            outputs = 4 * planes
            for block in range(blocks):
                # Strides are average pools, after the 3×3 convolution and before the 1×1.
                out_size = size // 2 if stage > 0 and block == 0 else size
                macs += size**2 * (inputs * planes + 9 * planes**2)
                macs += out_size**2 * planes * outputs
                batch_norm += size**2 * 2 * planes + out_size**2 * outputs
                if block == 0:  # the shortcut changes width
                    macs += out_size**2 * inputs * outputs
                    batch_norm += out_size**2 * outputs
                inputs, size = outputs, out_size
        tokens = self.num_tokens
        queries = 1 if training else tokens
        macs += inputs * (2 * tokens * inputs + queries * (inputs + 2 * tokens + embed_dim))
        return Operations(macs=macs, batch_norm=batch_norm)


SPLIT_STAGES = (3, 4)  # stages whose kernels, 95% of the weights, are sharded over a mesh


class BatchNorm(nn.Module):
    """Batch normalisation with PyTorch's running statistics, in float32.

    In training the statistics are those of the global batch or, with `group`, of every `group`
    samples in order of the batch, so that they depend on no mesh. The running mean and variance
    move by 0.1 towards the batch's (the groups' average). The running variance is unbiased, the one
    that normalises is not.
    """

    train: bool
    group: int | None = None
    scale_init: Init = nn.initializers.ones
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        shape = (x.shape[-1],)
        scale = self.param("scale", named("-", self.scale_init), shape)
        bias = self.param("bias", named("-", nn.initializers.zeros), shape)
        running_mean = self.variable("batch_stats", "mean", named("-", jnp.zeros), shape)
        running_var = self.variable("batch_stats", "var", named("-", jnp.ones), shape)
        x32 = x.astype(jnp.float32)
        if not self.train:
            x32 = (x32 - running_mean.value) * jax.lax.rsqrt(running_var.value + self.epsilon)
            return (x32 * scale + bias).astype(x.dtype)

        group = self.group or x.shape[0]
        count = group * x.shape[1] * x.shape[2]
        if x.shape[0] % group or count < 2:
            raise InputError(
                f"a batch of shape {x.shape} cannot be normalised in groups of {group}: batch_size "
                "must be a multiple of vision.batch_norm_group, and a group have several values."
            )
        # Both moments in one pass, about the running mean: about zero, the squares would cancel.
        center = jax.lax.stop_gradient(running_mean.value)
        x32 = rearrange(x32 - center, "(G B) H W C -> G B H W C", B=group)
        mean = checkpoint_name(x32.mean((1, 2, 3), keepdims=True), "moments")
        var = jnp.square(x32).mean((1, 2, 3), keepdims=True) - jnp.square(mean)
        # The difference may round below 0 where all values are equal.
        var = checkpoint_name(jnp.maximum(var, 0), "moments")
        x32 = x32 - mean
        running_mean.value = center + 0.1 * mean.mean((0, 1, 2, 3))
        unbiased = var.mean((0, 1, 2, 3)) * (count / (count - 1))
        running_var.value = 0.9 * running_var.value + 0.1 * unbiased
        x32 = x32 * jax.lax.rsqrt(var + self.epsilon) * scale + bias
        return rearrange(x32, "G B H W C -> (G B) H W C").astype(x.dtype)


def conv(
    x: Array,
    channels: int,
    size: int,
    *,
    stride: int = 1,
    convolve: Callable[..., Array] = jax.lax.conv_general_dilated,
    names: str = "P Q C O",
    name: str,
) -> Array:
    """Apply a convolution without bias, padded by half its size, initialised as in PyTorch."""
    init = named(names, uniform((x.shape[-1] * size * size) ** -0.5))
    return nn.Conv(
        channels,
        (size, size),
        stride,
        padding=size // 2,
        use_bias=False,
        dtype=x.dtype,
        kernel_init=init,
        conv_general_dilated=convolve,
        name=name,
    )(x)


def avg_pool(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B h w C"]:
    """Average over squares of `size` pixels."""
    return reduce(x, "B (h P) (w Q) C -> B h w C", "mean", P=size, Q=size) if size > 1 else x


class Downsample(nn.Module):
    """Shortcut of another shape: average pooling by `stride`, 1 × 1 convolution, norm."""

    channels: int
    stride: int
    norm: Callable[..., nn.Module]
    conv: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        x = self.conv(avg_pool(x, self.stride), self.channels, 1, name="0")
        return self.norm(name="1")(x)


class Bottleneck(nn.Module):
    """Bottleneck: 1 × 1, 3 × 3, average pooling, 1 × 1; the last norm's gain starts at zero."""

    planes: int
    stride: int
    norm: Callable[..., nn.Module]
    conv: Callable[..., Array]

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        channels = 4 * self.planes
        y = nn.relu(self.norm(name="bn1")(self.conv(x, self.planes, 1, name="conv1")))
        y = nn.relu(self.norm(name="bn2")(self.conv(y, self.planes, 3, name="conv2")))
        y = self.conv(avg_pool(y, self.stride), channels, 1, name="conv3")
        y = self.norm(scale_init=nn.initializers.zeros, name="bn3")(y)
        if self.stride > 1 or x.shape[-1] != channels:
            x = Downsample(channels, self.stride, self.norm, self.conv, name="downsample")(x)
        return nn.relu(x + y)


_save_moments = jax.checkpoint_policies.save_only_these_names("moments")


def save_convolutions(primitive: Any, *args: Any, **params: Any) -> bool:
    """Remat policy "hidden" of a ResNet: save convolutions' outputs and the moments of norms."""
    is_convolution = primitive is jax.lax.conv_general_dilated_p
    return is_convolution or _save_moments(primitive, *args, **params)


class Stage(nn.Module):
    """Blocks of one width; the first changes the resolution."""

    planes: int
    depth: int
    stride: int
    norm: Callable[..., nn.Module]
    conv: Callable[..., Array]
    remat: Remat
    layout: Layout

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w c"]:
        block = Bottleneck
        if self.remat != "none":
            policy = _save_moments  # two numbers per channel
            if layers.KEPT[self.remat] == layers.KEPT["hidden"]:
                policy = save_convolutions
            block = nn.remat(Bottleneck, policy=policy)
        for i in range(self.depth):
            stride = self.stride if i == 0 else 1
            x = block(self.planes, stride, self.norm, self.conv, name=str(i))(x)
            x = self.layout.constrain(x)
        return x


class AttentionPool2d(nn.Module):
    """OpenAI's attention pooling, whose query is the mean over all positions of the map."""

    config: ResNetConfig
    embed_dim: int
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, x: Float[Array, "B H W D"]) -> Float[Array, "B E"]:
        c = self.config
        width = c.output_width
        heads = (c.num_heads, width // c.num_heads)
        normal, linear_bias = nn.initializers.normal(width**-0.5), uniform(width**-0.5)

        x = rearrange(x, "B H W D -> B (H W) D")
        x = jnp.concatenate([x.mean(axis=1, keepdims=True), x], axis=1)
        positions = self.param("positional_embedding", named("L -", normal), (c.num_tokens, width))
        x = x + positions.astype(x.dtype)
        linear = functools.partial(
            Einsum, "BLD,DNK->BLNK", (width, *heads), heads, normal, linear_bias, self.layout.einsum
        )
        inputs = {"q_proj": x[:, :1], "k_proj": x, "v_proj": x}
        q, k, v = (linear(name=name)(tokens) for name, tokens in inputs.items())
        x = jax.nn.dot_product_attention(q, k, v)[:, 0]
        return Einsum(
            "BNK,NKE->BE",
            (*heads, self.embed_dim),
            (self.embed_dim,),
            normal,
            linear_bias,
            self.layout.einsum,
            name="c_proj",
        )(x)


class ModifiedResNet(nn.Module):
    """Stem, four stages, attention pooling. Images `[B, H, W, 3]` to features `[B, E]`."""

    config: ResNetConfig
    embed_dim: int
    remat: Remat = "none"
    layout: Layout = Layout()

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "B H W C"],
        keys: Key[Array, " B"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "B E"]:
        """Embed images; with `train` BatchNorm takes the batch's statistics. `keys` are unused."""
        c = self.config
        c.image_spec.check(images)

        def norm(**kwargs: Any) -> nn.Module:
            return BatchNorm(train, c.batch_norm_group, **kwargs)

        x = conv(images, c.width // 2, 3, stride=2, name="conv1")
        x = nn.relu(norm(name="bn1")(x))
        x = nn.relu(norm(name="bn2")(conv(x, c.width // 2, 3, name="conv2")))
        x = nn.relu(norm(name="bn3")(conv(x, c.width, 3, name="conv3")))
        x = self.layout.constrain(avg_pool(x, 2))
        split = functools.partial(conv, convolve=self.layout.conv, names="P Q C D")
        for i, depth in enumerate(c.layers):
            stage = Stage(
                c.width * 2**i,
                depth,
                1 if i == 0 else 2,
                norm,
                split if i + 1 in SPLIT_STAGES else conv,
                self.remat,
                self.layout,
                name=f"layer{i + 1}",
            )
            x = stage(x)
        return AttentionPool2d(c, self.embed_dim, self.layout, name="attnpool")(x)
