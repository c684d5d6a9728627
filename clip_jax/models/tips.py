"""Both towers of TIPSv2 (arXiv:2604.12012): a vision transformer with registers, and a text tower
with sinusoidal positions that is pooled by the mean of a text's tokens."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from clip_jax.errors import InputError, check_ranges
from clip_jax.models.layers import Activation
from clip_jax.models.text import Pool, TextConfig
from clip_jax.models.vit import ViTConfig


@dataclass(frozen=True, kw_only=True)
class TipsConfig(ViTConfig):
    """Image tower: a vision transformer with registers. The defaults are those of TIPSv2-B/14."""

    registers: int = 1  # Learned tokens after the class token, without position embeddings.
    image_size: int = 448  # Height and width of input images, in pixels.
    patch_size: int = 14  # Height and width of a patch, in pixels.
    pre_norm: bool = False  # LayerNorm before the first block.
    patch_bias: bool = True  # Bias in the patch projection.
    projection: bool = False  # Project to embed_dim; otherwise width must equal it.
    activation: Activation = "gelu"  # MLP activation.
    norm_epsilon: float = 1e-6  # Epsilon of LayerNorm.
    layer_scale: float | None = 1.0  # Initial gain of residual branches. None: no gains.

    resize_method = "linear"
    can_be_naflex = False


@dataclass(frozen=True, kw_only=True)
class TipsTextConfig(TextConfig):
    """Text tower of TIPSv2. The defaults are those of TIPSv2-B/14.

    Token embeddings are multiplied by √width, positions are sinusoidal, padding is masked.
    """

    context_length: int = 64  # Maximum tokens per text.
    vocab_size: int = 32_000  # Number of token ids.
    width: int = 768  # Channels of the residual stream.
    num_heads: int = 12  # Number of attention heads.
    causal: bool = False  # Tokens attend only to themselves and earlier ones.
    pool: Pool = "mean"  # What becomes the embedding. mean: the mean of the tokens but for padding.
    projection: bool = False  # Project to embed_dim; otherwise width must equal it.
    activation: Activation = "relu"  # MLP activation.

    masks_padding = True
    writes_captions = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "text.", context_length="[2, 1024]")  # positions are computed
        if self.pool not in ("mean", "first") or self.causal or self.width % 2 or self.width < 4:
            raise InputError(
                f"text.pool={self.pool!r}, text.causal={self.causal}, text.width={self.width}: "
                "TIPSv2 needs mean or first, False, and an even number from 4."
            )

    @property
    def token_scale(self) -> float:
        return self.width**0.5

    @property
    def positions_path(self) -> str | None:
        return None

    def fixed_positions(self) -> Float[np.ndarray, "L D"]:
        """Return sines, then cosines, of wavelengths from 2π to 20,000π."""
        half = self.width // 2
        frequencies = np.exp(np.arange(half) * -np.log(10_000) / (half - 1))
        angles = np.arange(self.context_length)[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
