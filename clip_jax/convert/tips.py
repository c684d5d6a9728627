"""TIPSv2 in transformers: `Tipsv2Model`, whose files have the names of the original program."""

from typing import Any

import numpy as np

from clip_jax.convert.settings import Settings, Table, by_table, number_of
from clip_jax.convert.state_dict import TORCH_AXES, TORCH_NAMES, Row, Rules, table
from clip_jax.convert.target import Assumptions
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.weights import mlp_ratio
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.tips import TipsConfig, TipsTextConfig

MODEL_TYPE = "tipsv2"
_MASK = "vision_encoder.mask_token"  # of pre-training
_TEMPERATURE = "temperature"  # which published files lack
_INITIAL = 0.005065968260169029
_NAMES: Rules = (
    (r"^visual/conv1/", "visual/patch_embed/proj/"),
    (r"^visual/class_embedding", "visual/cls_token"),
    (r"^visual/registers", "visual/register_tokens"),
    (r"^visual/positional_embedding", "visual/pos_embed"),
    (r"^visual/ln_post/", "visual/norm/"),
    (r"^visual/transformer/resblocks/", "visual/blocks/{}/"),
    (r"^(visual/.*)/ln_([12])/", r"\1/norm\2/"),
    (r"^(visual/.*)/ls_([12])/", r"\1/ls\2/"),
    (r"^(visual/.*)/in_proj/", r"\1/qkv/"),
    (r"^(visual/.*)/out_proj/", r"\1/proj/"),
    (r"^visual/", "vision_encoder/"),
    (r"^text/", "text_encoder/"),
    (r"resblocks/", "resblocks/{}/"),
    (r"^logit_scale", _TEMPERATURE),
    *TORCH_NAMES,
)
_AXES: Rules = (
    (r"^visual/class_embedding", "1 1 D -> D"),
    (r"^visual/(registers|positional_embedding)", "1 L D -> L D"),
    *TORCH_AXES,
)
_IMAGE: Table = {
    "image_size": ("image_size", 448), "patch_size": ("patch_size", 14),
    "hidden_size": ("width", 768), "num_hidden_layers": ("depth", 12),
    "num_attention_heads": ("num_heads", 12), "mlp_ratio": ("mlp_ratio", 4.0),
    "num_register_tokens": ("registers", 1), "layerscale_value": ("layer_scale", 1.0),
    "layer_norm_eps": ("norm_epsilon", 1e-6),
}  # fmt: skip
_TEXT: Table = {
    "vocab_size": ("vocab_size", 32_000), "max_position_embeddings": ("context_length", 64),
    "hidden_size": ("width", 768), "intermediate_size": ("mlp_width", 3072),
    "num_hidden_layers": ("depth", 12), "num_attention_heads": ("num_heads", 12),
    "layer_norm_eps": ("norm_epsilon", 1e-5),
}  # fmt: skip
ASSUMPTIONS: Assumptions = {
    "vision": TipsConfig,
    "text": TipsTextConfig,
    "has_logit_bias": False,
    "vision.activation": "gelu",
    "vision.pool": "class_token",
    "vision.pre_norm": False,
    "vision.patch_bias": True,
    "vision.projection": False,
    "vision.max_patches": None,
    "text.activation": "relu",
    "text.causal": False,
    "text.pool": "mean",
    "text.projection": False,
    "preprocess.resize_mode": ("shortest", "squash"),
}


def rows(config: CLIPConfig) -> list[Row]:
    """Return the table of parameters."""
    return table(config, _NAMES, _AXES)


def read(vision: Settings, text: Settings) -> CLIPConfig:
    """Read both towers. Raises InputError for an option that they do not have."""
    for section, name, value in (
        (vision, "use_swiglu_ffn", False), (vision, "hidden_act", "gelu"),
        (vision, "qkv_bias", True), (text, "hidden_act", "relu"), (text, "scale_sqrt_depth", True),
    ):  # fmt: skip
        if (found := section.get(name, value, object)) != value:
            raise InputError(
                f"{section.where}.{name}={found!r:.99} is not supported; it must be {value!r}."
            )
    fields = text.fields(_TEXT)
    ratio = mlp_ratio(fields["width"], fields.pop("mlp_width"))
    tower = TipsConfig(**vision.fields(_IMAGE))
    return CLIPConfig(
        embed_dim=tower.width,
        vision=tower,
        text=TipsTextConfig(**fields, mlp_ratio=ratio),
        init_logit_scale=1 / _INITIAL,
    )


def settings(config: CLIPConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of image and text tower."""
    return by_table(_IMAGE, config.vision), by_table(_TEXT, config.text)


def from_file(tensors: Tensors, content: dict[str, Any], source: str) -> Tensors:
    """Return a file's tensors with the logarithm of the logit scale for the temperature."""
    value = content.get("temperature_init_value", _INITIAL)
    value = number_of(value, f"{source}: temperature_init_value", positive=True)
    kept = {_TEMPERATURE: np.array(value, np.float32)} | tensors
    kept.pop(_MASK, None)
    scale = -np.log(kept[_TEMPERATURE].astype(np.float32)).reshape(())
    return kept | {_TEMPERATURE: scale.astype(kept[_TEMPERATURE].dtype)}


def to_file(tensors: Tensors) -> Tensors:
    """Undo `from_file`, with zeros for pre-training's mask token."""
    temperature = np.exp(-tensors[_TEMPERATURE].astype(np.float32))
    token = tensors["vision_encoder.cls_token"]
    kept = {_TEMPERATURE: temperature.astype(tensors[_TEMPERATURE].dtype)}
    return tensors | kept | {_MASK: np.zeros_like(token[0])}
