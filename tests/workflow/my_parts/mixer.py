"""Image tower: MLP-Mixer (Tolstikhin et al. 2021, arXiv:2105.01601)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, Key

from clip_jax.errors import InputError
from clip_jax.models import layers
from clip_jax.models.layers import Einsum, LayerNorm, Layout, Operations, Remat, named, uniform
from clip_jax.models.tower import ImageTowerConfig


@dataclass(frozen=True, kw_only=True)
class MlpMixerConfig(ImageTowerConfig):
    """Image tower: MLP-Mixer. The defaults are those of Mixer-B/16."""

    patch_size: int = 16  # Height and width of a patch, in pixels.
    width: int = 768  # Channels of a patch.
    depth: int = 12  # Number of blocks.
    token_width: int = 384  # Width of the MLP across patches.
    mlp_width: int = 3072  # Width of the MLP across channels.
    norm_epsilon: float = 1e-6  # Epsilon of LayerNorm.

    parts: ClassVar = (("token mixing", r"/token_mlp/"),)

    def __post_init__(self) -> None:
        layers.check_sizes(self, "vision.", norm_epsilon="(0, inf)", token_width="[1, 4194304]")
        if self.image_size % self.patch_size:
            raise InputError(
                f"vision.image_size={self.image_size} is not a multiple of vision.patch_size="
                f"{self.patch_size}; round it to one."
            )

    @property
    def tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_layers(self) -> int:
        return self.depth

    @property
    def first_layers(self) -> Mapping[str, int]:
        return {"conv1": 0} | {f"block{layer}": layer + 1 for layer in range(self.depth)}

    def module(self, embed_dim: int, remat: Remat, unroll: int, layout: Layout) -> "MlpMixer":
        return MlpMixer(self, embed_dim, remat, layout)

    def operations(self, embed_dim: int, *, training: bool = False) -> Operations:
        """Count the tower's operations for one image."""
        block = Operations(
            macs=2 * self.tokens * self.width * (self.token_width + self.mlp_width),
            layer_norm=2 * self.tokens * self.width,
        )
        patches = self.tokens * self.patch_size**2 * 3 * self.width
        ends = Operations(
            macs=patches + self.width * embed_dim, layer_norm=self.tokens * self.width
        )
        return self.depth * block + ends

    def onnx(self, graph: Any, inputs: str) -> str:
        """Add the tower to a graph of `export.graph`, in ONNX operators."""
        kernel = rearrange(graph.weight("visual/conv1/kernel"), "P Q C D -> D C P Q")
        sizes = [self.patch_size] * 2
        weights = graph.number(kernel), graph.number(graph.weight("visual/conv1/bias"))
        x = graph.op("Conv", inputs, *weights, kernel_shape=sizes, strides=sizes)
        x = graph.op("Reshape", x, graph.integers(0, 0, -1))  # [B, D, L]
        x = graph.op("Transpose", x, perm=[0, 2, 1])
        for layer in range(self.depth):
            path = f"visual/block{layer}"
            y = graph.layer_norm(x, f"{path}/ln_1", self.norm_epsilon)
            y = graph.op("Transpose", y, perm=[0, 2, 1])
            y = graph.activation(graph.dense(y, f"{path}/token_mlp/c_fc"), "gelu")
            y = graph.dense(y, f"{path}/token_mlp/c_proj")
            x = graph.op("Add", x, graph.op("Transpose", y, perm=[0, 2, 1]))
            y = graph.layer_norm(x, f"{path}/ln_2", self.norm_epsilon)
            y = graph.activation(graph.dense(y, f"{path}/mlp/c_fc"), "gelu")
            x = graph.op("Add", x, graph.dense(y, f"{path}/mlp/c_proj"))
        x = graph.mean(graph.layer_norm(x, "visual/ln_post", self.norm_epsilon))
        return graph.linear(x, graph.weight("visual/proj"))


class MlpMixer(nn.Module):
    """Patches, blocks that mix across patches and channels in turn, the mean, a projection."""

    config: MlpMixerConfig
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
        """Embed images. `keys` and `train` have no effect."""
        c = self.config
        c.image_spec.check(images)
        patch = c.patch_size
        x = rearrange(images, "B (h P) (w Q) C -> B (h w) P Q C", P=patch, Q=patch)
        shape, init = (patch, patch, 3, c.width), uniform((patch * patch * 3) ** -0.5)
        einsum = self.layout.einsum
        x = Einsum("BLPQC,PQCD->BLD", shape, (c.width,), init, einsum=einsum, name="conv1")(x)
        block = MixerBlock if self.remat == "none" else nn.remat(MixerBlock)
        for layer in range(c.depth):
            x = self.layout.constrain(block(c, name=f"block{layer}")(x))
        x = LayerNorm(c.norm_epsilon, name="ln_post")(x).mean(1)
        normal = named("D E", nn.initializers.normal(c.width**-0.5))
        proj = self.param("proj", normal, (c.width, self.embed_dim))
        return einsum("BD,DE->BE", x, proj.astype(x.dtype))


class TokenMLP(nn.Module):
    """MLP across the patches; their number need not divide by the mesh, so it is not sharded."""

    hidden: int

    @nn.compact
    def __call__(self, x: Float[Array, "B D L"]) -> Float[Array, "B D L"]:
        length = x.shape[-1]
        shape, init = (length, self.hidden), uniform(length**-0.5)
        x = layers.gelu(Einsum("BDL,LF->BDF", shape, shape[1:], init, init, name="c_fc")(x))
        init = uniform(self.hidden**-0.5)
        return Einsum("BDF,FL->BDL", shape[::-1], shape[:1], init, init, name="c_proj")(x)


class MixerBlock(nn.Module):
    """x + token_mlp(ln_1(x)) across the patches, then x + mlp(ln_2(x)) across the channels."""

    config: MlpMixerConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
        c = self.config
        y = jnp.swapaxes(LayerNorm(c.norm_epsilon, name="ln_1")(x), 1, 2)
        x = x + jnp.swapaxes(TokenMLP(c.token_width, name="token_mlp")(y), 1, 2)
        init = layers.BlockInit.image(c.width, c.mlp_width)
        mlp = layers.MLP(c.mlp_width, "gelu", init, name="mlp")
        return x + mlp(LayerNorm(c.norm_epsilon, name="ln_2")(x))
