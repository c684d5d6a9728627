"""The caption decoders that a model may have."""

from clip_jax.models.cappa import CapPaConfig
from clip_jax.models.decoder import CoCaConfig, MaMMUTConfig

DecoderConfig = CoCaConfig | MaMMUTConfig | CapPaConfig
