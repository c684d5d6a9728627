"""Image towers of DINOv2 (arXiv:2304.07193, with registers arXiv:2309.16588) and of DINOv3
(arXiv:2508.10104). They are trained without texts; the embedding is the class token after the norm.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from clip_jax.models.layers import Activation, Biases, BlockConfig, Layout
from clip_jax.models.rotary import check_heads, tables
from clip_jax.models.vit import ViTConfig

_BASE = 100.0  # ratio of the largest wavelength of DINOv3's rotations to the smallest
_CUBIC = -0.75  # parameter of PyTorch's bicubic kernel without antialiasing; with it, −0.5


@dataclass(frozen=True, kw_only=True)
class DinoConfig(ViTConfig):
    """Image tower of DINOv2 or DINOv3. The defaults are those of DINOv3-B-16."""

    # Positions of patches. rotary: attention turns queries and keys by a patch's row and column
    # (DINOv3). learned: embeddings (DINOv2), which are resized for images of another size.
    positions: Literal["rotary", "learned"] = "rotary"
    # Filter by which learned positions are resized. antialiased: as in timm and in transformers'
    # Dinov2WithRegistersModel. plain: PyTorch's without antialiasing, as in its Dinov2Model.
    resizing: Literal["antialiased", "plain"] = "antialiased"
    registers: int = 4  # Learned tokens after the class token, without position embeddings.
    # Biases of attention. qkv: of queries, keys and values (DINOv2); qv: not of keys (DINOv3);
    # none: of none (DINOv3-7B-16).
    biases: Biases = "qv"
    patch_size: int = 16  # Height and width of a patch, in pixels.
    pre_norm: bool = False  # LayerNorm before the first block.
    patch_bias: bool = True  # Bias in the patch projection.
    projection: bool = False  # Project to embed_dim; otherwise width must equal it.
    activation: Activation = "gelu"  # MLP activation; DINOv2-g and DINOv3's S+, H+, 7B: swiglu.
    layer_scale: float | None = 1e-5  # Initial gain of residual branches. None: no gains.

    can_be_naflex = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self)

    @property
    def has_table(self) -> bool:
        """Whether positions are learned."""
        return self.positions == "learned"

    @property
    def positions_path(self) -> str | None:
        return ViTConfig.positions_path if self.has_table else None

    @property
    def licence(self) -> str:
        if self.has_table:
            return ""
        return (
            "The image tower has DINOv3's architecture. If its weights come from Meta's, also by "
            "further training, they are under the DINOv3 License: "
            "https://ai.meta.com/resources/models-and-libraries/dinov3-license/."
        )

    @property
    def class_position(self) -> bool:
        """Whether the class token has a position embedding."""
        return self.has_table

    def block(self, layout: Layout) -> BlockConfig:
        block = super().block(layout)
        return block._replace(biases=self.biases, pair_distance=self.head_width // 2)

    def rotation(self) -> tuple[np.ndarray, np.ndarray] | None:
        if self.has_table:
            return None
        centers = (2 * np.arange(self.grid) + 1) / self.grid - 1
        coordinates = np.stack(np.meshgrid(centers, centers, indexing="ij"), -1)
        count = self.head_width // 4
        angles = 2 * np.pi * coordinates[..., None] * _BASE ** -(np.arange(count) / count)
        # The channels' first half is that of rows, then columns; the second half has the same.
        angles = np.tile(angles.reshape(self.num_patches, -1), 2)
        return tables(angles, self.extra_tokens, self.head_width // 2)

    def resize_grid(self, grid: Float[Any, "N D"], side: int) -> Float[Any, "n D"]:
        if self.resizing == "antialiased":
            return super().resize_grid(grid, side)
        weights = bicubic_weights(self.grid, side)
        square = grid.reshape(self.grid, self.grid, -1)
        if isinstance(grid, np.ndarray):
            resized = np.einsum("ij,kl,jlD->ikD", weights, weights, square, optimize=True)
        else:
            weights = jnp.asarray(weights, square.dtype)
            resized = jnp.einsum("ij,kl,jlD->ikD", weights, weights, square, precision="highest")
        return resized.reshape(side * side, -1)


def bicubic_weights(count: int, size: int) -> Float[np.ndarray, "n N"]:
    """Return the weights of `count` values in a row that is resized to `size`, as in PyTorch: by
    the kernel of Keys (1981) over four neighbours; the end values are repeated outside."""
    at = (np.arange(size) + 0.5) * (count / size) - 0.5
    rows, weights = np.arange(size), np.zeros((size, count))
    for tap in range(-1, 3):
        index = np.floor(at) + tap
        x = np.abs(at - index)
        near = ((_CUBIC + 2) * x - (_CUBIC + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x - 4
        kernel = np.where(x <= 1, near, _CUBIC * far)
        np.add.at(weights, (rows, np.clip(index, 0, count - 1).astype(int)), kernel)
    return weights


def _v2(width: int, depth: int, heads: int, **options: Any) -> DinoConfig:
    """DINOv2 as transformers has it, for images of 518 pixels."""
    return DinoConfig(
        image_size=518,
        patch_size=14,
        width=width,
        depth=depth,
        num_heads=heads,
        positions="learned",
        resizing="plain",
        registers=0,
        biases="qkv",
        norm_epsilon=1e-6,
        **options,
    )


def _v3(width: int, depth: int, heads: int, **options: Any) -> DinoConfig:
    return DinoConfig(width=width, depth=depth, num_heads=heads, **options)


def _with_registers(tower: DinoConfig) -> DinoConfig:
    return replace(tower, registers=4, resizing="antialiased")


_GATED: dict[str, Any] = {"activation": "swiglu"}
_V2 = {
    "DINOv2-S-14": _v2(384, 12, 6),
    "DINOv2-B-14": _v2(768, 12, 12),
    "DINOv2-L-14": _v2(1024, 24, 16),
    "DINOv2-g-14": _v2(1536, 40, 24, mlp_ratio=4096 / 1536, **_GATED),
}
TOWERS: dict[str, DinoConfig] = {
    **_V2,
    **{f"{name}-reg4": _with_registers(tower) for name, tower in _V2.items()},
    "DINOv3-S-16": _v3(384, 12, 6),
    "DINOv3-S-16-plus": _v3(384, 12, 6, **_GATED),
    "DINOv3-B-16": _v3(768, 12, 12),
    "DINOv3-L-16": _v3(1024, 24, 16),
    "DINOv3-H-16-plus": _v3(1280, 32, 20, **_GATED),
    "DINOv3-7B-16": _v3(4096, 40, 32, mlp_ratio=2.0, biases="none", **_GATED),
}
