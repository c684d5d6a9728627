"""TIPSv2 in transformers: `Tipsv2Model`, whose files have the names of the original program."""

from pathlib import Path
from typing import Any

import numpy as np

from clip_jax.convert import hugging_face_family, timm
from clip_jax.convert.hugging_face_family import Family
from clip_jax.convert.settings import Settings, Table, by_table
from clip_jax.convert.state_dict import TORCH, Convention, check_floating
from clip_jax.convert.target import Assumptions, assumed
from clip_jax.convert.tensor_files import Tensors
from clip_jax.convert.weights import mlp_ratio
from clip_jax.errors import InputError
from clip_jax.models.clip import CLIPConfig
from clip_jax.models.text import TokenizerConfig
from clip_jax.models.tips import TipsConfig, TipsTextConfig

_MASK = "vision_encoder.mask_token"  # of pre-training
_REGISTERS = "vision_encoder.register_tokens"  # empty without registers, and then not ours
_TEMPERATURE, _INITIAL = "temperature", 0.005065968260169029  # published files lack it
_REGISTER_TOKENS = Convention(
    names=((r"^visual/registers", "visual/trunk/register_tokens"),),
    axes=((r"^visual/registers", "1 L D -> L D"),),
)
_TOWERS = Convention(
    names=(
        (r"^visual/trunk/", "vision_encoder/"),
        (r"/fc1/", "/c_fc/"),
        (r"/fc2/", "/c_proj/"),
        (r"^text/", "text_encoder/"),
        (r"resblocks/", "resblocks/{}/"),
        (r"^logit_scale", _TEMPERATURE),
    ),
)
_CONVENTION = _REGISTER_TOKENS + timm.LAYER_SCALE + _TOWERS + TORCH
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
_FREE = ["mlp_ratio", "patch_dropout", "tokenizer"] + [
    x for x, _ in [*_IMAGE.values(), *_TEXT.values()]
]
_ASSUMPTIONS: Assumptions = {
    "vision": TipsConfig,
    "text": TipsTextConfig,
    "only_tower": None,
    "has_logit_bias": False,
    **assumed("vision", TipsConfig(), *_FREE),
    **assumed("text", TipsTextConfig(), *_FREE),
    "preprocess.resize_mode": ("shortest", "squash"),
}


def _read(content: dict[str, Any], path: Path) -> CLIPConfig:
    """Read both towers. Raises InputError for an option that they do not have."""
    vision, text = hugging_face_family.sections(content, path)
    for section, name, value in (
        (vision, "use_swiglu_ffn", False),
        (vision, "hidden_act", "gelu"),
        (vision, "qkv_bias", True),
        (text, "hidden_act", "relu"),
        (text, "scale_sqrt_depth", True),
    ):
        if (other := section.get(name, value, object)) != value:
            raise InputError(
                f"{section.where}.{name}={other!r:.99} is not supported; it must be {value!r}."
            )
    fields, tower = text.fields(_TEXT), TipsConfig(**vision.fields(_IMAGE))
    ratio = mlp_ratio(fields["width"], fields.pop("mlp_width"))
    rules = TokenizerConfig(file="", clean="none")
    return CLIPConfig(
        embed_dim=tower.width,
        vision=tower,
        text=TipsTextConfig(**fields, mlp_ratio=ratio, tokenizer=rules),
        init_logit_scale=1 / _INITIAL,
    )


def _write(config: CLIPConfig, _: str) -> dict[str, Any]:
    return {
        "vision_config": by_table(_IMAGE, config.vision),
        "text_config": by_table(_TEXT, config.text),
    }


def _from_file(tensors: Tensors, settings: Settings, source: str) -> Tensors:
    """Return a file's tensors with the logarithm of the logit scale, in float32."""
    check_floating(tensors, source)
    initial = settings.number("temperature_init_value", _INITIAL)
    temperature = np.asarray(tensors.get(_TEMPERATURE, initial), np.float32)
    scale = np.asarray(-np.log(temperature)).reshape(())
    ours = {
        name: x
        for name, x in tensors.items()
        if name != _MASK and not (name == _REGISTERS and not x.size)
    }
    return ours | {_TEMPERATURE: scale}


def _to_file(tensors: Tensors, _: CLIPConfig) -> Tensors:
    """Undo `_from_file`, with zeros for pre-training's mask token."""
    token = tensors["vision_encoder.cls_token"]
    tensors = {_REGISTERS: token[:, :0]} | tensors
    temperature = np.exp(-np.asarray(tensors[_TEMPERATURE], np.float32))
    return tensors | {_TEMPERATURE: temperature, _MASK: np.zeros_like(token[0])}


TIPS = Family(
    class_name="Tipsv2Model",
    model_type="tipsv2",
    fits=lambda config: isinstance(config.vision, TipsConfig),
    assumptions=lambda weights: _ASSUMPTIONS,
    convention=_CONVENTION,
    read=_read,
    write=_write,
    processor="Tipsv2",
    from_file=_from_file,
    to_file=_to_file,
    exact=("logit_scale",),
)
