"""Head of dino.txt (arXiv:2412.16334, section 3.2): transformer blocks on all tokens of a tower.

The image tower may stay frozen. The embedding is the class token beside the mean of the patches, so
that one half of a text's embedding is compared with each.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from clip_jax.errors import InputError
from clip_jax.models import layers
from clip_jax.models.images import ImageTokens, split_tokens
from clip_jax.models.layers import BlockConfig, BlockInit, Einsum, LayerNorm, Layout, Operations
from clip_jax.models.tower import ImageTowerConfig, TowerConfig
from clip_jax.models.vit import ViTConfig

_ALIGNED = 64  # to multiples of which the width of the gated MLP is rounded up


@dataclass(frozen=True, kw_only=True)
class ImageHeadConfig(TowerConfig):
    """Head of dino.txt on all tokens of an image tower. The defaults are the published ones.

    Its blocks have the tower's width and number of heads, a gated MLP, and no bias of queries, keys
    and values. If embed_dim is not twice that width, both halves are projected.
    """

    depth: int = 2  # Number of transformer blocks.
    layer_scale: float | None = 1e-5  # Initial gain of residual branches. None: no gains.

    def __post_init__(self) -> None:
        layers.check_sizes(self, "image_head.", layer_scale="(-inf, inf)")

    def check(self, vision: ImageTowerConfig, embed_dim: int) -> None:
        """Raise InputError unless the head fits the tower and the embedding."""
        if not isinstance(vision, ViTConfig) or vision.pool != "class_token" or vision.projection:
            raise InputError(
                "model.image_head needs a vision transformer with vision.pool='class_token' and "
                "vision.projection=False, such as DINOv3: choose another model.vision, or set "
                "model.image_head to None."
            )
        if embed_dim % 2:
            raise InputError(
                f"model.image_head needs an even embed_dim, got {embed_dim}: one half is for the "
                "class token, the other for the patches."
            )

    @property
    def num_layers(self) -> int:
        return self.depth

    @property
    def first_layers(self) -> Mapping[str, int]:
        return {"transformer": 1}

    def hidden_width(self, width: int) -> int:
        """Return the width of the gated MLP: 8/3 of the tower's, rounded up to a multiple of 64."""
        return -(-int(4 * width * 2 / 3) // _ALIGNED) * _ALIGNED

    def block(self, vision: ViTConfig, layout: Layout) -> BlockConfig:
        """Return the settings of the head's blocks."""
        return BlockConfig(
            vision.num_heads,
            self.hidden_width(vision.width),
            "swiglu",
            LayerNorm.epsilon,
            BlockInit(*[nn.initializers.normal(0.02)] * 4),
            self.layer_scale,
            layout=layout,
            biases="none",
        )

    def operations(
        self, vision: ViTConfig, embed_dim: int, *, training: bool = False
    ) -> Operations:
        """Count the head's operations for one image, in training without dropped patches."""
        patches = vision.kept_patches if training else vision.num_patches
        tokens, width = patches + vision.extra_tokens, vision.width
        block = layers.block_operations(tokens, width, self.hidden_width(width), gated=True)
        # The tower's norm is of all tokens; it counts that of the class token itself.
        ends = Operations(
            macs=(embed_dim != 2 * width) * width * embed_dim,
            layer_norm=(2 * tokens - 1) * width,
        )
        return self.depth * block + ends


class ImageHead(nn.Module):
    """Blocks on normalised tokens, a norm, the class token beside the mean of the patches."""

    config: ImageHeadConfig
    vision: ViTConfig
    embed_dim: int
    remat: layers.Remat = "none"
    unroll: int = 1
    layout: Layout = Layout()

    @nn.compact
    def __call__(self, tokens: ImageTokens, each: bool = False) -> Float[Array, "B ..."]:
        """Embed images [B, E]; or `each` patch [B, L, E/2], by the half that is the patches'."""
        x, length = split_tokens(tokens)
        width, extra = self.vision.width, self.vision.extra_tokens
        block = self.config.block(self.vision, self.layout)
        stack = layers.Transformer(
            block, self.config.depth, self.remat, self.unroll, name="transformer"
        )
        x = LayerNorm(block.epsilon, name="ln_post")(stack(x, length)[0])
        if each:
            both = x[:, extra:]
        else:
            patches = layers.mean(x[:, extra:], None if length is None else length - extra)
            both = jnp.stack([x[:, 0], patches], axis=1)
        if self.embed_dim != 2 * width:
            both = Einsum(
                "BLD,DE->BLE",
                (width, self.embed_dim // 2),
                None,
                nn.initializers.normal(width**-0.5),
                einsum=self.layout.einsum,
                name="proj",
            )(both)
        return both if each else both.reshape(both.shape[0], self.embed_dim)
