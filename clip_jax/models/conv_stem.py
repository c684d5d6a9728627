"""Image tower: a vision transformer with a convolutional stem (MobileCLIP-B, arXiv:2311.17049)."""

from dataclasses import dataclass

import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float

from clip_jax.errors import InputError
from clip_jax.models.layers import Activation, Einsum, Layout, gelu, uniform
from clip_jax.models.resnet import BatchNorm
from clip_jax.models.vit import ViTConfig

STEM = (4, 2, 2)  # sizes, and strides, of the convolutions: of all, the size of a patch


@dataclass(frozen=True, kw_only=True)
class ConvStemConfig(ViTConfig):
    """Image tower: a vision transformer with a convolutional stem. The defaults are MobileCLIP-B's.

    Three convolutions replace the linear map of patches of 16 pixels; BatchNorm and GELU follow the
    first two, of a quarter of the width. The class token has no position embedding.
    """

    batch_norm_group: int | None = None  # Samples normalised together in training. None: batch.
    patch_size: int = 16  # Height and width of a patch, in pixels.
    pre_norm: bool = False  # LayerNorm before the first block.
    projection_bias: bool = True  # Bias in the projection.
    activation: Activation = "gelu"  # MLP activation.
    norm_epsilon: float = 1e-6  # Epsilon of LayerNorm.

    class_position = False
    can_be_naflex = False
    parts = (*ViTConfig.parts, ("norms", r"/bn\d/|batch_norm"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.patch_size != 16 or self.max_patches is not None or self.width % 4:
            raise InputError(
                f"vision.patch_size={self.patch_size}, vision.max_patches={self.max_patches}, "
                f"vision.width={self.width}: a convolutional stem needs 16, None, a multiple of 4."
            )

    @property
    def stem_widths(self) -> tuple[int, ...]:
        """Input channels of the convolutions, and output channels of the last."""
        return 3, self.width // 4, self.width // 4, self.width

    @property
    def patch_macs(self) -> int:
        widths, outputs, macs = self.stem_widths, self.patch_size**2, 0
        for i, size in enumerate(STEM):
            outputs //= size**2
            macs += outputs * size**2 * widths[i] * widths[i + 1]
        return macs

    def stem(self, layout: Layout) -> nn.Module:
        return ConvStem(self, layout)


class ConvStem(nn.Module):
    """Convolutions whose strides are their sizes, so that no output depends on two patches."""

    config: ConvStemConfig
    layout: Layout

    @nn.compact
    def __call__(self, x: Float[Array, "B L P Q C"], train: bool) -> Float[Array, "B L D"]:
        widths, side = self.config.stem_widths, x.shape[2]
        x = rearrange(x, "B L P Q C -> B (L P Q) C")
        for i, size in enumerate(STEM):
            side //= size
            x = rearrange(x, "B (L h P w Q) C -> B (L h w) P Q C", h=side, w=side, P=size, Q=size)
            last, shape = i == len(STEM) - 1, (size, size, widths[i], widths[i + 1])
            name, einsum = ("D", self.layout.einsum) if last else ("O", jnp.einsum)
            x = Einsum(
                f"BLPQC,PQC{name}->BL{name}",
                shape,
                (shape[-1],) if last else None,
                uniform((size * size * widths[i]) ** -0.5),
                einsum=einsum,
                name=f"conv{i}",
            )(x)
            if not last:
                norm = BatchNorm(train, self.config.batch_norm_group, name=f"bn{i}")
                x = gelu(norm(x[:, :, None])[:, :, 0])
        return x
