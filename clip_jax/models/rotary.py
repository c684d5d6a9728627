"""Image tower: a vision transformer with rotary positions, of PE core (arXiv:2504.13181, table 1),
EVA-02 (arXiv:2303.11331, 2.1) and EVA-CLIP (arXiv:2303.15389)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from clip_jax.errors import InputError, check_ranges
from clip_jax.models.layers import BlockConfig, Layout, Norm
from clip_jax.models.vit import ViTConfig

_BASE = 10_000.0  # ratio of the largest wavelength of the rotations to the smallest


def check_heads(tower: ViTConfig) -> None:
    """Raise InputError if a tower's heads cannot be rotated by rows and columns of patches."""
    check_ranges(tower, "vision.", head_width="[1, 512]")  # tables of angles are computed
    if tower.max_patches is not None or tower.head_width % 4:
        raise InputError(
            f"vision.max_patches={tower.max_patches}, vision.width={tower.width} in "
            f"{tower.num_heads} heads: a {type(tower).__name__} needs None, and heads of a "
            "multiple of 4 channels."
        )


@dataclass(frozen=True, kw_only=True)
class RotaryConfig(ViTConfig):
    """Image tower: a vision transformer of PE core or EVA. The defaults are those of PE-Core-B-16.

    With pool=map, pool_heads are the heads of the pooling, whose MLP has four times the width.
    """

    # Rotary positions turn half of a head's channels by the column of a patch, half by its row.
    # columns: the columns' half is first, positions begin behind the class token (PE core). rows:
    # the rows' half is first, positions begin at 0 (EVA-02). none: absolute positions alone.
    rotary: Literal["columns", "rows", "none"] = "columns"
    reference_grid: int = 14  # Rows and columns of the grid to which rotary positions are scaled.
    norm: Norm = "before"  # LayerNorm of a block: before each branch, or (branch) of its output.
    inner_norm: bool = False  # LayerNorm also before the last linear map of both branches.
    key_bias: bool = True  # Bias of attention's keys.
    patch_size: int = 16  # Height and width of a patch, in pixels.
    pool: Literal["class_token", "mean", "map"] = "map"  # Pooling. map: attention pooling.
    activation: Literal["gelu", "swiglu"] = "gelu"  # MLP activation; EVA-02 has swiglu.

    can_be_naflex = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self)
        if self.pool == "map" and self.width % self.pool_heads:
            raise InputError(
                f"vision.width={self.width} must be a multiple of vision.pool_heads="
                f"{self.pool_heads}, the heads of vision.pool='map'."
            )

    @property
    def map_sizes(self) -> tuple[int, int]:
        return self.pool_heads, 4 * self.width

    def block(self, layout: Layout) -> BlockConfig:
        block = super().block(layout)
        biases = "qkv" if self.key_bias else "qv"
        return block._replace(norm=self.norm, inner_norm=self.inner_norm, biases=biases)

    def rotation(self) -> tuple[np.ndarray, np.ndarray] | None:
        if self.rotary == "none":
            return None
        at = np.arange(self.grid, dtype=np.float64)
        at += self.rotary == "columns" and self.class_token
        rows, columns = np.meshgrid(*[at * (self.reference_grid / self.grid)] * 2, indexing="ij")
        axes = (columns, rows) if self.rotary == "columns" else (rows, columns)
        count = self.head_width // 4
        angles = np.stack(axes, -1)[..., None] * _BASE ** -(np.arange(count) / count)
        angles = np.repeat(angles.reshape(self.num_patches, -1), 2, axis=-1)
        return tables(angles, self.extra_tokens, 1)


def tables(
    angles: Float[np.ndarray, "N K"], extra: int, distance: int
) -> tuple[Float[np.ndarray, "L K"], Float[np.ndarray, "L K"]]:
    """Return the tables of `attention.Rotation` for angles of patches.

    `extra` tokens before them are turned by the angle 0. `distance` is that of a pair's channels.
    """
    width = angles.shape[1]
    angles = np.concatenate([np.zeros((extra, width)), angles])
    sign = np.where(np.arange(width) // distance % 2 == 0, -1.0, 1.0)
    return np.cos(angles).astype(np.float32), (np.sin(angles) * sign).astype(np.float32)
